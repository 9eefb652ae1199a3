#!/bin/bash
# Runs once, when the data folder of the postgres service is new: a role and a database for each of the three.
# psql reads the passwords from the environment, so that no command line shows them.
set -euo pipefail
psql --quiet -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres <<'SQL'
\getenv airflow POSTGRES_AIRFLOW_PASSWORD
\getenv mlflow POSTGRES_MLFLOW_PASSWORD
\getenv neuroloop POSTGRES_NEUROLOOP_PASSWORD
CREATE ROLE airflow LOGIN PASSWORD :'airflow';
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow';
CREATE ROLE neuroloop LOGIN PASSWORD :'neuroloop';
CREATE DATABASE airflow OWNER airflow;
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE neuroloop OWNER neuroloop;
SQL
