import os
import subprocess
import sys
from pathlib import Path

import pytest

from neuroloop.core.errors import InvalidSetting
from neuroloop.core.settings import PREFIX, Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    return {"NEUROLOOP_HOME": str(tmp_path / "home"), "NEUROLOOP_ENV_FILE": str(tmp_path / ".env")}


def test_every_setting_stands_in_the_example_file_with_its_description_and_default():
    text = (ROOT / ".env.example").read_text()
    for name, field in Settings.model_fields.items():
        assert f"# {field.description}\n#{PREFIX}{name.upper()}={field.default}\n" in text, name


def test_the_example_file_names_no_setting_that_does_not_exist():
    named = {line[1:].split("=")[0] for line in (ROOT / ".env.example").read_text().splitlines() if line[:2] == "#N"}
    known = {f"{PREFIX}{name.upper()}" for name in Settings.model_fields}
    assert named - known == {f"{PREFIX}REAL_DATA", f"{PREFIX}ENV_FILE"}


def test_an_unknown_setting_is_refused_with_the_nearest_name(bare):
    with pytest.raises(InvalidSetting, match=r"NEUROLOOP_STORE_ULR.*did you mean NEUROLOOP_STORE_URL"):
        Settings.load({**bare, "NEUROLOOP_STORE_ULR": "gs://x"})


@pytest.mark.parametrize(
    ("name", "value", "hint"),
    [
        ("STORE_URL", "ftp://host", "s3://"),
        ("STORE_URL", "file://srv/neuroloop", "three slashes"),
        ("MLFLOW_ARTIFACTS_URL", "file://srv/mlflow", "three slashes"),
        ("MLFLOW_ARTIFACTS_URL", "wasbs://c@a.blob.core.windows.net", "az://"),
        ("DATABASE_URL", "mysql://x", "postgresql://"),
        ("NOTIFY_URL", "http://x", "smtp://"),
        ("API_PORT", "99999", "65535"),
        ("TRAIN_MINUTES", "soon", "Training budget"),
        ("IMAGE_SIZE", "100", "multiple of 16"),
        ("DISTRIBUTION", "two", "multi_worker"),
        ("RETRAINING_SCHEDULE", "hourly", "five fields"),
        ("RETRAINING_SCHEDULE", "99 * * * *", "out of range"),
        ("HOUSEKEEPING_SCHEDULE", "0 0 30 2 *", "no time of a calendar"),
        ("UI_API_KEY", "guessable", "make-env"),
        ("UI_PEOPLE", "ann@example.org=king", "uploader, reader, admin"),
        ("UI_PEOPLE", "ann@example.org", "address=role"),
    ],
)
def test_a_wrong_value_names_the_setting_and_what_it_should_be(bare, name, value, hint):
    with pytest.raises(InvalidSetting) as caught:
        Settings.load({**bare, PREFIX + name: value})
    assert PREFIX + name in str(caught.value)
    assert hint in str(caught.value)


def test_a_schedule_is_checked_where_airflow_is_not_installed_too(bare):
    program = "import sys; sys.modules['croniter'] = None\nfrom neuroloop.core.settings import Settings\n"
    program += "for each in sys.argv[1:]:\n"
    program += "    try: Settings(retraining_schedule=each); print('good')\n"
    program += "    except ValueError: print('bad')"
    good = ["*/10 * * * *", "0 0-23/4 * * MON-FRI", "59 23 31 12 0,7", "0 0 * JAN 5#3"]
    bad = ["60 * * * *", "0 24 * * *", "0 0 0 * *", "0 0 1-32 * *", "0 0 * 13 *", "0 0 * * 8"]
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}
    argv = [sys.executable, "-c", program, *good, *bad]
    done = subprocess.run(argv, env=path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["good"] * 4 + ["bad"] * 6


def test_the_environment_wins_over_the_users_file_which_wins_over_the_generated_one(bare, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "env").write_text("NEUROLOOP_SEED=1\nNEUROLOOP_API_PORT=1001\nNEUROLOOP_UI_PORT=1002\n")
    (tmp_path / ".env").write_text("# mine\nNEUROLOOP_SEED=2\nNEUROLOOP_API_PORT='2001'\n")
    settings = Settings.load({**bare, "NEUROLOOP_SEED": "3"})
    assert (settings.seed, settings.api_port, settings.ui_port) == (3, 2001, 1002)


@pytest.mark.parametrize(
    ("line", "value"),
    [
        ("phantom://      # simulated", "phantom://"),
        ("/data/scan#1", "/data/scan#1"),
        ("'/data/a # b'", "/data/a # b"),
        ('"phantom://" # simulated', "phantom://"),
        ("   # nothing", ""),
    ],
)
def test_a_comment_may_follow_a_value_as_it_may_for_compose(bare, tmp_path, line, value):
    file = tmp_path / ".env"
    file.write_text(f"NEUROLOOP_DATA_LICENCE={line}\n")
    assert Settings.load({**bare, "NEUROLOOP_ENV_FILE": str(file)}).data_licence == value


def test_a_line_that_is_no_setting_is_refused_with_its_place(bare, tmp_path):
    (tmp_path / ".env").write_text("NEUROLOOP_SEED\n")
    with pytest.raises(InvalidSetting, match=r"\.env:1 is not KEY=VALUE"):
        Settings.load(bare)


def test_a_file_of_settings_that_is_no_text_is_named(bare, tmp_path):
    (tmp_path / ".env").write_bytes("# Schlüssel".encode("latin-1"))
    with pytest.raises(InvalidSetting, match=r"\.env cannot be read.*UTF-8"):
        Settings.load(bare)


def test_a_home_of_somebody_who_is_not_there_is_named(bare):
    with pytest.raises(InvalidSetting, match="NEUROLOOP_HOME='~nobody-here/state' is no folder"):
        Settings.load({**bare, "NEUROLOOP_HOME": "~nobody-here/state"})


def test_what_a_process_needs_and_has_not_is_named(bare):
    with pytest.raises(InvalidSetting, match="NEUROLOOP_DATABASE_URL is not set"):
        Settings.load(bare).require("database_url")


def test_a_secret_that_is_not_valid_is_not_repeated(bare):
    with pytest.raises(InvalidSetting) as caught:
        Settings.load(bare | {"NEUROLOOP_UI_API_KEY": "nl_almost-a-key"})  # pragma: allowlist secret
    assert "NEUROLOOP_UI_API_KEY" in str(caught.value)
    assert "almost" not in str(caught.value)


URLS = [name for name in Settings.model_fields if name.endswith(("_url", "_uri")) and name != "data_url"]


@pytest.mark.parametrize("field", URLS)
@pytest.mark.parametrize(
    "value",
    [
        "wrong://app:S3cret@db/neuroloop",  # pragma: allowlist secret
        "wrong://app:S3cret@S3cret@db/neuroloop",  # pragma: allowlist secret
        "wrong://app:S3c/S3cret@db/neuroloop",
        "wrong://app:S3cret",
        "wrong://:S3cret/0",
        "wrong://db/neuroloop?password=S3cret&user=app",
        "app:S3cret@db/neuroloop",
        "//app:S3cret@db/neuroloop",
        "wrong:app:S3cret//S3cret@db",
        "host=db user=app password=S3cret dbname=neuroloop",  # pragma: allowlist secret
    ],
)
def test_the_password_in_a_url_that_is_not_valid_is_not_repeated(bare, field, value):
    with pytest.raises(InvalidSetting, match=f"{PREFIX}{field.upper()}=.*it must start with") as caught:
        Settings.load({**bare, PREFIX + field.upper(): value})
    assert "S3c" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("postgres://app:S3cret@db:5432/neuroloop", "postgres://***@db:5432/neuroloop"),  # pragma: allowlist secret
        ("ftp://host:21/folder", "ftp://host:21/folder"),
        ("mail.example.org:587", "mail.example.org:587"),
        ("http://[::1]:5000/x", "http://[::1]:5000/x"),
    ],
)
def test_of_a_url_that_is_not_valid_the_rest_is_shown(bare, value, shown):
    with pytest.raises(InvalidSetting) as caught:
        Settings.load({**bare, "NEUROLOOP_DATABASE_URL": value})
    assert f"NEUROLOOP_DATABASE_URL={shown!r} is not valid" in str(caught.value)


def test_a_url_that_stands_in_the_wrong_setting_keeps_its_password_too(bare):
    with pytest.raises(InvalidSetting, match=r"NEUROLOOP_API_PORT='postgresql://\*\*\*@db'") as caught:
        Settings.load({**bare, "NEUROLOOP_API_PORT": "postgresql://app:S3cret@db"})  # pragma: allowlist secret
    assert "S3cret" not in str(caught.value)
    with pytest.raises(InvalidSetting) as caught:
        Settings.load({**bare, "NEUROLOOP_API_PORT": "redis://:S3cret/0"})  # pragma: allowlist secret
    assert "S3cret" not in str(caught.value)


DATABASES = ("database_url", "airflow_database_url", "mlflow_database_url")


@pytest.mark.parametrize(
    ("field", "scheme"),
    [*((name, "postgresql") for name in DATABASES), ("airflow_broker_url", "rediss"), ("notify_url", "smtps")],
)
@pytest.mark.parametrize("password", ["S3cr/et", "S3cr#et", "S3cr?et", "12/3", "12?3", "S[3cret", "S3cr\u2100et"])
def test_a_password_that_is_not_percent_encoded_is_refused_without_repeating_a_piece_of_it(
    bare, field, scheme, password
):
    with pytest.raises(InvalidSetting, match=r"%2F for /") as caught:
        Settings.load({**bare, PREFIX + field.upper(): f"{scheme}://app:{password}@host/0"})
    assert f"'{scheme}://***@host/0'" in str(caught.value)
    assert password[:3] not in str(caught.value)


@pytest.mark.parametrize("field", DATABASES)
@pytest.mark.parametrize("password", ["S3cr%et", "100%", "S3cr%00et", "S3@cret"])
def test_a_password_that_postgresqls_client_cannot_read_is_refused_at_the_start(bare, field, password):
    with pytest.raises(InvalidSetting, match=r"%25 for %") as caught:
        Settings.load({**bare, PREFIX + field.upper(): f"postgresql://app:{password}@host/name"})
    assert password not in str(caught.value)


@pytest.mark.parametrize(
    "field", ["mlflow_tracking_uri", "mlflow_url", "api_url", "airflow_url", "airflow_internal_url"]
)
def test_an_address_that_pages_and_mails_show_holds_no_password(bare, field):
    value = "http://ann:S3cret@host:5000"  # pragma: allowlist secret
    with pytest.raises(InvalidSetting, match="NEUROLOOP_MLFLOW_PASSWORD") as caught:
        Settings.load({**bare, PREFIX + field.upper(): value})
    assert "S3cret" not in str(caught.value)


@pytest.mark.parametrize("hosts", ["one,two", "one:5432,two:5432"])
def test_a_database_of_several_hosts_is_refused_in_words_and_without_its_password(bare, hosts):
    value = f"postgresql://app:S3cret@{hosts}/name"  # pragma: allowlist secret
    with pytest.raises(InvalidSetting, match="NEUROLOOP_DATABASE_URL") as caught:
        Settings.load({**bare, "NEUROLOOP_DATABASE_URL": value})
    assert "several hosts" in str(caught.value)
    assert "S3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("database_url", "postgresql://app:p%25%2F%23%40w@[::1]:5432/name?sslmode=require"),  # pragma: allowlist secret
        ("database_url", "postgresql:///name?host=/run/postgresql"),
        ("notify_url", "smtp://ann@example.org:100%@mail.example.org:587"),  # as urlsplit and unquote read it
        ("airflow_broker_url", "redis://:S3cret@redis:6379/0"),
        ("airflow_url", "https://hub.example.org/user/ann@example.org/proxy/8080"),
    ],
)
def test_a_url_that_can_be_read_is_taken_as_it_is(bare, field, value):
    assert getattr(Settings.load({**bare, PREFIX + field.upper(): value}), field) == value


def test_the_first_entry_that_fits_an_address_says_what_its_owner_may(bare):
    people = "boss@example.org=admin, *@example.org=reader,guest@other.org=uploader"
    settings = Settings.load({**bare, "NEUROLOOP_UI_PEOPLE": people})
    found = [
        settings.role_of(who) for who in ("Boss@Example.org", "ann@example.org", "guest@other.org", "eve@evil.org")
    ]
    assert found == ["admin", "reader", "uploader", None]
    assert Settings.load(bare).role_of("ann@example.org") is None
