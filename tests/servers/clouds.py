"""Emulators of other clouds' stores: moto for Amazon S3 and IAM, Azurite for Azure Blob. `make emulators` gets them.

They lie in `.cache/emulators` of the checkout, outside the project's environment: moto and everything else that speaks
to AWS wants an older python-dateutil than the one that is pinned. Tests that need one skip where it is missing.
"""

import base64
import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.request
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import pytest

from neuroloop.bootstrap import open_store
from neuroloop.core.ports import ObjectStore
from neuroloop.core.rights import Identity

ROOT = Path(__file__).parents[2]
EMULATORS = ROOT / ".cache" / "emulators"
PYTHON = EMULATORS / "python" / "bin" / "python"
AWS_PACKAGES = next((EMULATORS / "python" / "lib").glob("python*/site-packages"), EMULATORS)
"""boto3, dvc-s3 and what they need, as the extra `aws` installs them; to be put on a subprocess's PYTHONPATH."""
AZURITE = EMULATORS / "node_modules" / "azurite" / "dist" / "src" / "blob" / "main.js"


@dataclass
class S3Server:
    """Where moto listens; `root` is the account's owner, who may do everything."""

    url: str

    def environment(self, key: str = "root", secret: str = "root") -> dict[str, str]:
        """The variables with which AWS's own clients, and ours, come here as the holder of this key."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def new_bucket(self) -> str:
        name = f"bucket-{secrets.token_hex(6)}"
        self._ask(f"/{name}", method="PUT")
        return name

    def put(self, bucket: str, name: str, data: bytes = b"") -> None:
        """An object as another program would store it."""
        self._ask(f"/{bucket}/{name}", data, method="PUT")

    def fail(self, *faults: tuple[str, int, bool]) -> None:
        """Spoil the next answers: (method, status, whether the request takes effect)."""
        self._ask("/faults", json.dumps(faults).encode(), method="POST")

    def faults(self) -> list:
        """Those that are still to come."""
        return json.loads(self._ask("/faults"))

    def new_user(self, name: str, policy: dict) -> dict[str, str]:
        """A user of IAM with this policy alone; the variables to come as them."""
        self._iam(Action="CreateUser", UserName=name)
        document = json.dumps(policy)
        self._iam(Action="PutUserPolicy", UserName=name, PolicyName="store", PolicyDocument=document)
        found = ET.fromstring(self._iam(Action="CreateAccessKey", UserName=name))
        values = {element.tag.rpartition("}")[2]: str(element.text) for element in found.iter()}
        return self.environment(values["AccessKeyId"], values["SecretAccessKey"])

    def enforce(self) -> None:
        """From now on every request needs a valid signature and a policy that allows it."""
        self._ask("/moto-api/reset-auth", b"0", method="POST", headers={"Content-Type": "text/plain"})

    def listings(self, environment: dict[str, str]) -> list[str | None]:
        """The prefixes that the holder of these variables has listed so far."""
        return [prefix for key, prefix in json.loads(self._ask("/listings")) if key == environment["AWS_ACCESS_KEY_ID"]]

    def _iam(self, **form: str) -> bytes:
        scope = "Credential=root/20260101/us-east-1/iam/aws4_request"
        headers = {"Authorization": f"AWS4-HMAC-SHA256 {scope}, SignedHeaders=host, Signature=0"}
        return self._ask("/", urlencode(form | {"Version": "2010-05-08"}).encode(), headers=headers)

    def _ask(self, path: str, data: bytes | None = None, **how) -> bytes:
        return urllib.request.urlopen(urllib.request.Request(self.url + path, data, **how), timeout=30).read()


@dataclass
class AzureServer:
    """Where Azurite listens, and its one account."""

    url: str
    account: str
    key: str

    def environment(self) -> dict[str, str]:
        """The variables with which Azure's own clients, and ours, come here."""
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": self.account,
            "AZURE_STORAGE_ACCOUNT_KEY": self.key,
            "AZURE_STORAGE_ENDPOINT": f"{self.url}/{self.account}",
            "AZURE_STORAGE_CONNECTION_STRING": self.connection,
        }

    @property
    def connection(self) -> str:
        parts = {"AccountName": self.account, "AccountKey": self.key, "BlobEndpoint": f"{self.url}/{self.account}"}
        return ";".join(["DefaultEndpointsProtocol=http", *(f"{name}={value}" for name, value in parts.items())])

    def new_container(self) -> str:
        from azure.storage.blob import BlobServiceClient

        name = f"container-{secrets.token_hex(6)}"
        BlobServiceClient.from_connection_string(self.connection).create_container(name)
        return name


@dataclass
class Identities:
    """A bucket whose policies, those of deploy/identities, are enforced."""

    server: S3Server
    bucket: str
    environments: dict[str, dict[str, str]]
    """By identity, and `owner`, who may do everything."""

    @property
    def url(self) -> str:
        return f"s3://{self.bucket}"

    @contextlib.contextmanager
    def acting(self, name: str) -> Iterator[ObjectStore]:
        """Until the block ends, this process comes to the store as this identity; a store that does so for good."""
        before = {key: os.environ.get(key) for key in self.environments[name]}
        os.environ.update(self.environments[name])
        try:
            store = open_store(self.url)
            store.exists("probe/opened")  # connects, with the variables of now
            yield store
        finally:
            for key, value in before.items():
                os.environ.pop(key, None)
                if value is not None:
                    os.environ[key] = value


@contextlib.contextmanager
def identities(folder: Path, port: int) -> Iterator[Identities]:
    """An S3 of its own that enforces the policies. What moto cannot: conditions, so those of listings are left out."""
    with s3(folder, port) as server:
        bucket = server.new_bucket()
        everything = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "s3:*", "Resource": "*"}]}
        environments = {"owner": server.new_user("owner", everything)}
        for identity in Identity:
            text = (ROOT / "deploy" / "identities" / "aws" / f"{identity}.json").read_text()
            policy = json.loads(text.replace("${bucket}", bucket))
            for statement in policy["Statement"]:
                statement.pop("Condition", None)
            environments[identity] = server.new_user(identity, policy)
        server.enforce()
        yield Identities(server, bucket, environments)


@contextlib.contextmanager
def s3(folder: Path, port: int) -> Iterator[S3Server]:
    """moto on `port`; its log lies in `folder`."""
    if not PYTHON.exists():
        pytest.skip("there is no S3 to test against: make emulators")
    script = str(Path(__file__).with_name("s3_server.py"))
    with _running([str(PYTHON), script, str(port)], folder, f"http://127.0.0.1:{port}/moto-api/"):
        yield S3Server(f"http://127.0.0.1:{port}")


@contextlib.contextmanager
def azure(folder: Path, port: int) -> Iterator[AzureServer]:
    """Azurite on `port`, in memory; its log lies in `folder`."""
    node = shutil.which("node")
    if not AZURITE.exists() or node is None:
        pytest.skip("there is no Azure Blob storage to test against: make emulators, which needs npm")
    server = AzureServer(f"http://127.0.0.1:{port}", "tests", base64.b64encode(secrets.token_bytes(32)).decode())
    command = [node, str(AZURITE), "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence"]
    command += ["--skipApiVersionCheck", "--disableTelemetry", "--silent"]
    accounts = os.environ | {"AZURITE_ACCOUNTS": f"{server.account}:{server.key}"}
    with _running(command, folder, f"{server.url}/{server.account}", accounts):
        yield server


@contextlib.contextmanager
def _running(command: list[str], folder: Path, page: str, environment: dict[str, str] | None = None) -> Iterator[None]:
    """The server until the block ends, from when it answers at all."""
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=output, start_new_session=True
        )
    deadline = time.monotonic() + 120
    while not _answers(page):
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"{command[0]} did not come up:\n{log.read_text()[-3000:]}")
        time.sleep(0.1)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _answers(page: str) -> bool:
    try:
        urllib.request.urlopen(page, timeout=5)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
