#!/bin/sh
# Run once by the image of PostgreSQL, on an empty volume: one database for each server.
set -eu
for name in prefect mlflow; do
  psql --set ON_ERROR_STOP=1 --username "$POSTGRES_USER" --command "CREATE DATABASE $name OWNER \"$POSTGRES_USER\""
done
