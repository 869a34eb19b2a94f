#!/bin/sh
# Start MLflow's server with users. Everything comes from the environment; see compose.yaml.
set -eu

# Users and their rights are in the same database, so that one dump has everything. A password is
# checked anew after half a minute: each check takes a tenth of a second, more than the rest of a request.
umask 077
MLFLOW_AUTH_CONFIG_PATH=${MLFLOW_AUTH_CONFIG_PATH:-${TMPDIR:-/tmp}/mlflow-auth.ini}
export MLFLOW_AUTH_CONFIG_PATH
cat > "$MLFLOW_AUTH_CONFIG_PATH" <<INI
[mlflow]
default_permission = ${DEFAULT_PERMISSION:-READ}
database_uri = $MLFLOW_BACKEND_STORE_URI
auth_cache_ttl_seconds = ${AUTH_CACHE_SECONDS:-30}
INI

# The bucket, where it is not there yet: a page that lists files needs it before the first upload.
case "$MLFLOW_ARTIFACTS_DESTINATION" in s3://*) python - <<'PYTHON'
import os
from urllib.parse import urlsplit

import boto3
from botocore.exceptions import ClientError

bucket = urlsplit(os.environ["MLFLOW_ARTIFACTS_DESTINATION"]).netloc
store = boto3.client("s3", endpoint_url=os.environ.get("MLFLOW_S3_ENDPOINT_URL"))
try:
    store.head_bucket(Bucket=bucket)
except ClientError as error:
    if error.response["ResponseMetadata"]["HTTPStatusCode"] != 404:
        raise SystemExit(f"the bucket {bucket} cannot be used: {error}")
    store.create_bucket(Bucket=bucket)
PYTHON
esac

exec mlflow server --host "${HOST:-0.0.0.0}" --port "${PORT:-5000}" --workers "${WORKERS:-4}" \
  --app-name basic-auth --serve-artifacts
