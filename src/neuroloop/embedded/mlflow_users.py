"""Makes MLflow's user of the API before MLflow starts: it reads everything, and moves the model's aliases.

MLflow itself makes its admin at its first start. Both get the passwords of the settings here, at every start.

The admin is for people and the trainer. Their runs and files the API can neither change nor delete, nor their versions
delete. MLflow has no finer rights: who moves aliases may edit tags and register versions, and everybody may open an
experiment of their own.
"""

from mlflow.exceptions import MlflowException
from mlflow.server.auth.permissions import EDIT
from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

from neuroloop.adapters.mlflow_registry import MODEL
from neuroloop.core.settings import MLFLOW_API_USER, Settings
from neuroloop.embedded.roles import driver


def main() -> None:
    """Make the API's user, and give both the passwords of the settings, those that stand there."""
    settings = Settings.load()
    if not settings.mlflow_password:  # then MLflow has no login
        return
    store, password = SqlAlchemyStore(), settings.mlflow_api_password
    store.init_db(driver(settings.mlflow_database_url))
    if password and not store.has_user(MLFLOW_API_USER):
        store.create_user(MLFLOW_API_USER, password)
    for name, secret in ((MLFLOW_API_USER, password), (settings.mlflow_user, settings.mlflow_password)):
        if secret and store.has_user(name) and not store.authenticate_user(name, secret):
            store.update_user(name, password=secret)
    if not password:
        return
    try:
        store.create_registered_model_permission(MODEL, MLFLOW_API_USER, EDIT.name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


if __name__ == "__main__":
    main()
