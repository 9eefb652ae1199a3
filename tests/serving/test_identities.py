"""The use cases under the policies of deploy/identities, each process with the keys of its own identity."""

import hashlib
from pathlib import Path

import pytest

from adapters.test_data_versions import fill, with_the_extra_aws
from neuroloop.adapters.folder import FolderStore
from neuroloop.adapters.smtp import SmtpNotifier, start_sink
from neuroloop.bootstrap import Services
from neuroloop.core import keys
from neuroloop.core.errors import Forbidden
from neuroloop.core.ports import ObjectStore
from neuroloop.core.rights import Identity, Right, allowed
from neuroloop.loop import corrected, feedback, housekeeping, retraining
from serving.running import head, noise, serving


def test_scans_are_taken_corrected_and_retrained_on_with_no_more_rights_than_needed(
    services: Services, champion: str, s3_identities, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = services.settings.model_copy(update={"store_url": s3_identities.url, "feedback_threshold": 3})
    ids = []
    with s3_identities.acting(Identity.API), serving(Services(settings)) as api:
        assert api.client.get("/health/ready").status_code == 200
        for n in range(5):
            predicted = api.predict(head("glioma", height=200 + n))
            assert predicted.status_code == 201, predicted.text
            ids.append(predicted.json()["id"])
            said = api.feedback(ids[-1], "correct", "pituitary")
            assert said.status_code < 300, said.text
        moved = api.feedback(ids[0], "correct", "meningioma")
        assert moved.status_code < 300, moved.text
        assert api.predict(noise()).status_code == 422
        assert api.client.get(f"/v1/predictions/{ids[0]}/image").content
        assert api.client.get("/v1/monitoring").status_code == 200
        assert api.client.get("/v1/mails").status_code == 200
        assert (
            api.client.delete(f"/v1/predictions/{ids[4]}", params={"reason": "mistake", "by": "ann"}).status_code == 200
        )
    with s3_identities.acting("owner") as owner:
        wanted = sorted([keys.correction("meningioma", ids[0]), *(keys.correction("pituitary", i) for i in ids[1:4])])
        assert sorted(key for key in owner.list(keys.CORRECTIONS) if key.endswith(".png")) == wanted
        # What a killed server may leave: a second copy, under another class.
        owner.put(keys.correction("notumor", ids[1]), b"stray")

    trainer = Services(settings)
    with s3_identities.acting(Identity.TRAINER):
        found = retraining.check_source_flag(trainer, "run-1")
        assert not found["go"]
        assert "Housekeeping, which may, has to put the corrections in order first" in found["reason"]
    with s3_identities.acting(Identity.HOUSEKEEPER):
        assert housekeeping.tidy(Services(settings))["corrections_mended"] == 1
    with s3_identities.acting(Identity.TRAINER):
        assert retraining.check_source_flag(trainer, "run-2")["go"]
        assert retraining.flag_true(trainer, "run-2")["corrections"] == 4
        used = feedback.allowed(trainer.log, feedback.used(trainer.store))
        assert corrected.arrays_of(trainer, used, 64).images.shape[0] == 4
        with_the_extra_aws(monkeypatch)
        version, _ = trainer.versions.commit(fill(tmp_path / "work", {"Training/glioma/1.jpg": b"scan"}))
        assert trainer.store.exists(keys.image(f"{version}.dir"))
        assert trainer.store.get(keys.image(hashlib.md5(b"scan").hexdigest())) == b"scan"

    for identity in (Identity.API, Identity.TRAINER, Identity.HOUSEKEEPER):
        listed = s3_identities.server.listings(s3_identities.environments[identity])
        assert listed
        assert [prefix for prefix in listed if not allowed(identity, Right.LIST, prefix)] == []


class Limited(FolderStore):
    """A store that lets an identity do what its rights say and nothing else, as a bucket with its policy does."""

    def __init__(self, path: Path, identity: Identity) -> None:
        super().__init__(str(path))
        self._identity = identity

    def _need(self, right: Right, key: str) -> None:
        if not allowed(self._identity, right, key):
            raise Forbidden(f"{self._identity} lacks the right to {right} {key!r}")

    def list(self, prefix: str) -> list[str]:
        self._need(Right.LIST, prefix)
        return super().list(prefix)

    def get(self, key: str) -> bytes:
        self._need(Right.READ, key)
        return super().get(key)

    def exists(self, key: str) -> bool:
        self._need(Right.READ, key)
        return super().exists(key)

    def create(self, key: str, data: bytes, *, content_type: str = "application/octet-stream") -> None:
        self._need(Right.WRITE, key)
        super().create(key, data, content_type=content_type)

    put = create

    def delete(self, key: str) -> None:
        self._need(Right.DELETE, key)
        super().delete(key)


def send_one_twice_and_another(store: ObjectStore, port: int) -> None:
    sink = start_sink(store, "127.0.0.1", port)
    try:
        for occasion in ("run 1", "run 1", "run 2"):
            SmtpNotifier(f"smtp://127.0.0.1:{port}", "a@localhost", "b@localhost").send("s", "b", once=occasion)
    finally:
        sink.stop()


def test_the_mail_sink_keeps_a_mail_and_knows_a_repeat_with_no_more_rights_than_needed(tmp_path: Path, free_port):
    send_one_twice_and_another(Limited(tmp_path, Identity.MAIL), free_port())
    assert len(FolderStore(str(tmp_path)).list(keys.MAIL)) == 2


def test_the_mail_sink_keeps_a_mail_and_knows_a_repeat_under_the_policy_of_its_identity(s3_identities, free_port):
    with s3_identities.acting(Identity.MAIL) as store:
        send_one_twice_and_another(store, free_port())
    with s3_identities.acting("owner") as owner:
        assert len([key for key in owner.list(keys.MAIL) if key.endswith(".eml")]) == 2
    listed = s3_identities.server.listings(s3_identities.environments[Identity.MAIL])
    assert keys.MAIL in listed
    assert [prefix for prefix in listed if not allowed(Identity.MAIL, Right.LIST, prefix)] == []
