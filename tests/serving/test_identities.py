"""The use cases under the policies of deploy/identities, each process with the keys of its own identity."""

import hashlib
from pathlib import Path

import pytest

from adapters.test_data_versions import fill, with_the_extra_aws
from neuroloop.bootstrap import Services
from neuroloop.core import keys
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
            corrected = api.feedback(ids[-1], "correct", "pituitary")
            assert corrected.status_code < 300, corrected.text
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
