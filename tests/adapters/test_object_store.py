"""The contract of `ports.ObjectStore`, on a folder and on three clouds' stores; then what is particular to each."""

import os
import stat
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from neuroloop.adapters.cloud import AZURE, S3, CloudStore
from neuroloop.adapters.folder import FolderStore
from neuroloop.adapters.gcs import GcsStore
from neuroloop.core.errors import AlreadyExists, Forbidden, NeuroLoopError, NotFound, Unavailable
from servers.relay import Relay

CLOUDS = ("gcs", "s3", "azure")


@pytest.fixture(params=["folder", *CLOUDS, *(f"{cloud} below a prefix" for cloud in CLOUDS)])
def any_store(request: pytest.FixtureRequest, tmp_path: Path):
    if request.param == "folder":
        return FolderStore(str(tmp_path / "not" / "made" / "yet"))
    cloud, _, below = request.param.partition(" ")
    return opened(request, cloud, "some/prefix" if below else "")


def opened(request: pytest.FixtureRequest, cloud: str, prefix: str = "", bucket: str = ""):
    """A store in a new bucket of a cloud, or in `bucket`."""
    name = request.getfixturevalue({"gcs": "gcs_bucket", "s3": "s3_bucket", "azure": "azure_container"}[cloud])
    if cloud == "gcs":
        return GcsStore(bucket or name, prefix)
    return CloudStore(S3 if cloud == "s3" else AZURE, bucket or name, prefix)


BAD_KEYS = ["", "/etc/passwd", "../up", "a/../../up", "a//b", "a/", "./a", "nul\0byte"]


def test_bytes_come_back_as_they_were_put(any_store):
    data = bytes(range(256)) * 100 + b"\r\n--boundary\n\r"
    any_store.put("a/b/c.bin", data)
    assert any_store.get("a/b/c.bin") == data
    assert any_store.exists("a/b/c.bin")


def test_an_empty_object_is_an_object(any_store):
    any_store.put("empty", b"")
    assert any_store.get("empty") == b""
    assert any_store.list("") == ["empty"]


def test_nine_megabytes_come_back_whole(any_store):
    data = os.urandom(9 << 20)  # above 8 MiB the Google client uploads in chunks
    any_store.put("large", data)
    assert any_store.get("large") == data


def test_put_replaces_what_was_there(any_store):
    any_store.put("key", b"a longer first value")
    any_store.put("key", b"second")
    assert any_store.get("key") == b"second"


def test_create_refuses_a_taken_key_and_leaves_it_alone(any_store):
    any_store.create("key", b"first")
    with pytest.raises(AlreadyExists, match="key"):
        any_store.create("key", b"second")
    assert any_store.get("key") == b"first"


def test_create_refuses_a_key_taken_by_put(any_store):
    any_store.put("key", b"first")
    with pytest.raises(AlreadyExists):
        any_store.create("key", b"second")


def test_of_eight_threads_that_create_a_key_one_wins(any_store):
    ready = threading.Barrier(8)

    def create(n: int) -> bool:
        ready.wait()
        try:
            any_store.create("retraining/batches/000001.json", str(n).encode())
        except AlreadyExists:
            return False
        return True

    for attempt in range(3):
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, range(8)))
        assert sum(won) == 1, attempt
        assert any_store.get("retraining/batches/000001.json") == str(won.index(True)).encode()
        any_store.delete("retraining/batches/000001.json")


def test_an_object_tells_when_it_was_last_written(any_store):
    before = datetime.now(UTC) - timedelta(seconds=2)
    any_store.put("a/b", b"x")
    assert before < any_store.modified("a/b") < datetime.now(UTC) + timedelta(seconds=2)
    with pytest.raises(NotFound):
        any_store.modified("a/c")


def test_discarding_unfinished_writes_leaves_objects_alone(any_store):
    any_store.put("a/b", b"x")
    assert any_store.discard_unfinished(datetime.now(UTC) + timedelta(days=1)) == 0
    assert any_store.list("") == ["a/b"]


def test_a_missing_key_is_not_found(any_store):
    any_store.put("folder/object", b"")
    for key in ("nothing", "folder", "folder/object/below"):
        with pytest.raises(NotFound, match=key):
            any_store.get(key)
        assert not any_store.exists(key)


def test_a_listing_has_all_keys_that_start_with_the_prefix_sorted(any_store):
    for key in ("b/2", "a/1", "b/10", "b/deep/er/1", "bc", "z"):
        any_store.put(key, b"x")
    assert any_store.list("") == ["a/1", "b/10", "b/2", "b/deep/er/1", "bc", "z"]
    assert any_store.list("b") == ["b/10", "b/2", "b/deep/er/1", "bc"]
    assert any_store.list("b/") == ["b/10", "b/2", "b/deep/er/1"]
    assert any_store.list("b/1") == ["b/10"]
    assert any_store.list("b/deep/e") == ["b/deep/er/1"]
    assert any_store.list("none/of/these") == []
    assert any_store.list("z/below") == []


def test_names_with_spaces_brackets_percents_and_umlauts_are_fine(any_store):
    names = ["Tr-gl (1).jpg", "100%25 sure?.jpg", "größe&co#1.png", "a+b=c.jpg"]
    for name in names:
        any_store.put(f"Training/{name}", name.encode())
    assert any_store.list("Training/") == sorted(f"Training/{name}" for name in names)
    assert [any_store.get(f"Training/{name}") for name in names] == [name.encode() for name in names]


def test_delete_removes_and_a_second_delete_does_nothing(any_store):
    any_store.put("a/key", b"x")
    any_store.delete("a/key")
    any_store.delete("a/key")
    any_store.delete("a/key/below")
    assert not any_store.exists("a/key")
    assert any_store.list("") == []


@pytest.mark.parametrize("key", BAD_KEYS)
def test_a_key_that_is_no_relative_path_is_refused(any_store, key: str):
    for call in (any_store.get, any_store.exists, any_store.delete, lambda k: any_store.put(k, b"")):
        with pytest.raises(NeuroLoopError, match="no object key"):
            call(key)
    with pytest.raises(NeuroLoopError, match="no object key"):
        any_store.create(key, b"")


def test_a_prefix_cannot_leave_the_store(any_store):
    with pytest.raises(NeuroLoopError, match="no object key"):
        any_store.list("../")


def test_a_new_store_is_empty_and_healthy(any_store):
    any_store.check()
    assert any_store.list("") == []


def test_a_reader_sees_the_old_or_the_new_object_never_a_part(any_store):
    old, new = b"o" * 300_000, b"n" * 300_000
    any_store.put("key", old)
    stop = threading.Event()
    seen: set[bytes] = set()

    def read() -> None:
        while not stop.is_set():
            seen.add(any_store.get("key"))

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(10):
        any_store.put("key", new if n % 2 else old)
    stop.set()
    reader.join()
    assert seen <= {old, new}


# --- folder -------------------------------------------------------------------------------------


def test_an_unfinished_write_is_never_listed(tmp_path: Path):
    store = FolderStore(str(tmp_path))
    store.put("a", b"")
    folder = next(path for path in tmp_path.iterdir() if path.is_dir())
    (folder / "left-by-a-crash").write_bytes(b"half")
    assert store.list("") == ["a"]
    with pytest.raises(NeuroLoopError, match="no object key"):
        store.get(f"{folder.name}/left-by-a-crash")


def test_a_write_leaves_no_temporary_file_whether_it_wins_or_not(tmp_path: Path):
    store = FolderStore(str(tmp_path))
    store.put("a", b"1")
    store.create("b", b"2")
    with pytest.raises(AlreadyExists):
        store.create("b", b"3")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a", "b"]


def test_a_folder_that_nobody_may_write_to_is_no_store_but_a_source():
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are nobody else's to look into
        Path(folder).chmod(0o555)
        child = os.fork()
        if child == 0:  # root may write anywhere
            if os.getuid() == 0:
                os.setuid(65534)
            code = 0
            try:
                FolderStore(folder, follow_links=True).check()
                FolderStore(folder).check()
            except Unavailable as error:
                code = 1 if "read-only" in str(error) else 2
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        Path(folder).chmod(0o755)
        assert os.waitstatus_to_exitcode(status) == 1


def test_a_read_only_folder_can_be_listed_and_read(tmp_path: Path):
    (tmp_path / "glioma").mkdir()
    (tmp_path / "glioma" / "1.jpg").write_bytes(b"scan")
    before = sorted(tmp_path.rglob("*"))
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        store = FolderStore(str(tmp_path), follow_links=True)
        store.check()
        assert store.list("") == ["glioma/1.jpg"]
        assert store.get("glioma/1.jpg") == b"scan"
    finally:
        tmp_path.chmod(0o755)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_unavailable_and_leaves_the_old_object(tmp_path: Path):
    store = FolderStore(str(tmp_path))
    store.put("key", b"old")
    # A limit on the size of files stands in for a full disk; it cannot be raised again, so it gets its own process.
    code = (
        "import resource, signal, sys\n"
        "from neuroloop.adapters.folder import FolderStore\n"
        "from neuroloop.core.errors import Unavailable\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    FolderStore(sys.argv[1]).put('key', b'x' * 5000)\n"
        "except Unavailable as error:\n    print(error)"
    )
    environment = {"PYTHONPATH": ":".join(entry for entry in sys.path if entry)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, check=True
    )
    assert "File too large" in done.stdout
    assert "disk space" in done.stdout
    assert store.get("key") == b"old"
    assert store.list("") == ["key"]


def test_a_store_folder_that_is_a_file_is_unavailable(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"")
    store = FolderStore(str(tmp_path / "file"))
    with pytest.raises(Unavailable, match="Not a directory"):
        store.check()
    with pytest.raises(Unavailable):
        store.put("a", b"")


# --- Google Cloud Storage -----------------------------------------------------------------------


def test_a_missing_bucket_is_unavailable_and_says_how_to_mend_it(gcs_bucket: str):
    store = GcsStore("no-such-bucket")
    for call in (store.check, lambda: store.get("a"), lambda: store.put("a", b""), lambda: store.exists("a")):
        with pytest.raises(Unavailable, match="gcloud storage buckets create gs://no-such-bucket"):
            call()


def test_a_transient_fault_is_retried(gcs_bucket: str, gcs_server):
    store = GcsStore(gcs_bucket)
    gcs_server.faults.extend([("POST", 503, False), ("GET", 503, False)])
    store.put("key", b"data")
    assert store.get("key") == b"data"
    assert not gcs_server.faults


def test_a_create_whose_answer_was_lost_still_wins(gcs_bucket: str, gcs_server):
    store = GcsStore(gcs_bucket)
    gcs_server.faults.append(("POST", 503, True))
    store.create("key", b"mine")
    assert not gcs_server.faults
    assert store.get("key") == b"mine"
    with pytest.raises(AlreadyExists):
        store.create("key", b"yours")


def test_two_prefixes_of_a_bucket_do_not_meet(gcs_bucket: str):
    one, two = GcsStore(gcs_bucket, "one"), GcsStore(gcs_bucket, "/two/")
    one.put("key", b"1")
    two.put("key", b"2")
    assert (one.get("key"), two.get("key")) == (b"1", b"2")
    assert GcsStore(gcs_bucket).list("") == ["one/key", "two/key"]


def test_the_consoles_folder_markers_are_no_keys(gcs_bucket: str):
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    client = storage.Client(project="test", credentials=AnonymousCredentials())
    client.bucket(gcs_bucket).blob("Training/glioma/").upload_from_string(b"")
    store = GcsStore(gcs_bucket)
    store.put("Training/glioma/1.jpg", b"scan")
    assert store.list("") == ["Training/glioma/1.jpg"]


def test_a_storage_that_is_down_is_unavailable(monkeypatch: pytest.MonkeyPatch, free_port):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(Unavailable, match="gs://bucket"):
        GcsStore("bucket").check()


def test_missing_credentials_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "missing.json"))
    with pytest.raises(Unavailable, match="gcloud auth application-default login"):
        GcsStore("bucket").check()


def test_a_refused_read_of_what_is_not_there_is_not_found(gcs_bucket: str, gcs_server):
    store = GcsStore(gcs_bucket)
    store.put("taken", b"x")
    # Without the right to list the whole bucket, Google answers 403 for a missing object.
    for key, error in (("missing", NotFound), ("taken", Forbidden)):
        for call in (store.get, store.modified):
            gcs_server.faults.append(("GET", 403, False))
            with pytest.raises(error, match=key):
                call(key)
    assert not gcs_server.faults


# --- Amazon S3 and Azure Blob -------------------------------------------------------------------


@pytest.fixture(params=["s3", "azure"])
def cloud(request: pytest.FixtureRequest) -> str:
    return request.param


def test_what_is_not_there_but_the_bucket_is_missing_too_is_unavailable(request, cloud: str):
    store = opened(request, cloud, bucket="no-such-bucket")
    made = {"s3": "aws s3 mb s3://no-such-bucket", "azure": "container create --name no-such-bucket"}[cloud]
    for call in (
        store.check,
        lambda: store.get("a"),
        lambda: store.put("a", b""),
        lambda: store.create("a", b""),
        lambda: store.exists("a"),
        lambda: store.list(""),
        lambda: store.delete("a"),
    ):
        with pytest.raises(Unavailable, match=made):
            call()


def test_two_prefixes_of_one_bucket_do_not_meet(request, cloud: str):
    one = opened(request, cloud, "one")
    two = opened(request, cloud, "/two/")
    one.put("key", b"1")
    two.put("key", b"2")
    assert (one.get("key"), two.get("key")) == (b"1", b"2")
    assert opened(request, cloud).list("") == ["one/key", "two/key"]


def test_an_object_that_goes_up_in_parts_is_whole_and_keeps_its_type(request, cloud: str):
    import obstore

    store = opened(request, cloud)
    data = os.urandom(20 << 20)
    store.put("shards/000.npz", data, content_type="application/x-numpy")
    assert store.get("shards/000.npz") == data
    found = obstore.get(store._store, "shards/000.npz", options={"head": True}).attributes
    assert found["Content-Type"] == "application/x-numpy"


def test_the_folder_markers_of_amazons_console_are_no_keys(s3_bucket: str, s3_server):
    s3_server.put(s3_bucket, "Training/")
    s3_server.put(s3_bucket, "Training/glioma/")
    store = CloudStore(S3, s3_bucket)
    store.put("Training/glioma/1.jpg", b"scan")
    assert store.list("") == ["Training/glioma/1.jpg"]


def test_a_transient_fault_of_s3_is_retried(s3_bucket: str, s3_server):
    store = CloudStore(S3, s3_bucket)
    s3_server.fail(("PUT", 503, False), ("GET", 503, False))
    store.put("key", b"data")
    assert store.get("key") == b"data"
    assert s3_server.faults() == []


def test_a_create_on_s3_whose_answer_was_lost_still_wins(s3_bucket: str, s3_server):
    store = CloudStore(S3, s3_bucket)
    s3_server.fail(("PUT", 503, True))
    store.create("key", b"mine")
    assert s3_server.faults() == []
    assert store.get("key") == b"mine"
    with pytest.raises(AlreadyExists):
        store.create("key", b"yours")


@pytest.mark.parametrize(
    ("vendor", "endpoint"), [(S3, "AWS_ENDPOINT_URL"), (AZURE, "AZURE_STORAGE_ENDPOINT")], ids=["s3", "azure"]
)
def test_a_cloud_that_is_down_is_unavailable(vendor, endpoint: str, monkeypatch: pytest.MonkeyPatch, free_port):
    values = {
        "AWS_ACCESS_KEY_ID": "any",
        "AWS_SECRET_ACCESS_KEY": "any",  # pragma: allowlist secret
        "AZURE_STORAGE_ACCOUNT_NAME": "any",
        "AZURE_STORAGE_ACCOUNT_KEY": "YW55",  # pragma: allowlist secret
        endpoint: f"http://127.0.0.1:{free_port()}",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Unavailable, match=f"check the network and that {vendor.scheme}://bucket"):
        CloudStore(vendor, "bucket").check()


def test_a_cloud_that_falls_silent_costs_no_thread(s3_bucket: str, s3_server, free_port, monkeypatch):
    with Relay(int(s3_server.url.rsplit(":", 1)[1]), free_port()) as relay:
        monkeypatch.setenv("AWS_ENDPOINT_URL", relay.url)
        store = CloudStore(S3, s3_bucket)
        store.put("key", b"data")
        relay.stall()
        with ThreadPoolExecutor(2) as pool:
            asked = [pool.submit(store.check), pool.submit(store.get, "key")]
            for call in asked:
                with pytest.raises(Unavailable, match="check the network"):
                    call.result(120)  # a check gives up after 5 s, a read after 15 s and one more try
            relay.flow()
        assert store.get("key") == b"data"


def test_an_azure_account_that_is_not_named_is_asked_for(monkeypatch: pytest.MonkeyPatch):
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    with pytest.raises(Unavailable, match="set AZURE_STORAGE_ACCOUNT_NAME"):
        CloudStore(AZURE, "container").check()


def test_the_signature_in_an_address_is_not_repeated(azure_container: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=2022-11-02&sig=c2lnbmF0dXJl&sp=r")
    with pytest.raises(Unavailable) as caught:
        CloudStore(AZURE, azure_container).get("key")
    assert "sig=" not in str(caught.value)
    assert "c2lnbmF0dXJl" not in str(caught.value)
