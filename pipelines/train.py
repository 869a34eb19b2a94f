"""Train: measure, transfer and export a model from a folder of images."""

from tl.pipelines import run


def job(config):
    print(config)
    return 0.0


def main(argv=None):
    run("train", job, argv)


if __name__ == "__main__":
    main()
