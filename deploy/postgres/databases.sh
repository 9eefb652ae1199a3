#!/bin/bash
# A role and a database for each of the three. The postgres service runs it when its data folder is new; on a managed
# server run it once by hand (deploy/kubernetes/README.md). Run again, it makes what is missing and sets the passwords.
# psql (14 or newer) reads them from the environment, so that no command line shows them.
set -euo pipefail
psql --quiet -v ON_ERROR_STOP=1 --username "${POSTGRES_USER:-postgres}" --dbname postgres <<'SQL'
\getenv airflow POSTGRES_AIRFLOW_PASSWORD
\getenv mlflow POSTGRES_MLFLOW_PASSWORD
\getenv neuroloop POSTGRES_NEUROLOOP_PASSWORD
SELECT format('CREATE ROLE %I LOGIN', name) FROM unnest(ARRAY['airflow', 'mlflow', 'neuroloop']) name
  WHERE name NOT IN (SELECT rolname FROM pg_roles) \gexec
ALTER ROLE airflow PASSWORD :'airflow';
ALTER ROLE mlflow PASSWORD :'mlflow';
ALTER ROLE neuroloop PASSWORD :'neuroloop';
-- A managed server's administrator is no superuser, and gives databases to roles that it is a member of only.
GRANT airflow, mlflow, neuroloop TO CURRENT_USER;
SELECT format('CREATE DATABASE %I OWNER %I', name, name) FROM unnest(ARRAY['airflow', 'mlflow', 'neuroloop']) name
  WHERE name NOT IN (SELECT datname FROM pg_database) \gexec
SQL
