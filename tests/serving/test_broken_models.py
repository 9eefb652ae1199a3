"""A broken model becomes the champion: it is refused before it serves, and the old one answers all the while."""

import hashlib
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from mlflow import MlflowClient
from onnx import numpy_helper

from neuroloop.model.bundle import Bundle
from neuroloop.model.canary import Canary
from serving.running import Api, canary_of, head, serving, wait, write_bundle


class Payload:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def rehash(folder: Path, *more: str, **changes: object) -> None:
    """Make the manifest fit whatever now stands in the folder, as a careless or malicious hand would."""
    manifest = json.loads((folder / "bundle.json").read_text()) | changes
    for name in (*manifest["files"], *more):
        manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "bundle.json").write_text(json.dumps(manifest))


def rewire(folder: Path, change: Callable[[onnx.ModelProto], None]) -> None:
    model = onnx.load(folder / "model.onnx")
    change(model)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    rehash(folder)


def set_masks(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[onnx.ModelProto], None]:
    """Change the network's only weights."""

    def apply(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name == "masks":
                tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), "masks"))

    return apply


def nan_weights(folder: Path, mark: Path) -> None:
    rewire(folder, set_masks(lambda masks: np.full_like(masks, np.nan)))


def one_nan_weight(folder: Path, mark: Path) -> None:
    def spoil(masks: np.ndarray) -> np.ndarray:
        masks = masks.copy()
        masks[0, 5, 5, 2] = np.nan
        return masks

    rewire(folder, set_masks(spoil))


def swapped_classes(folder: Path, mark: Path) -> None:
    rewire(folder, set_masks(lambda masks: masks[..., [0, 3, 2, 1]]))


def swapped_classes_without_canaries(folder: Path, mark: Path) -> None:
    rewire(folder, set_masks(lambda masks: masks[..., [0, 3, 2, 1]]))
    manifest = json.loads((folder / "bundle.json").read_text())
    del manifest["files"]["canary.npz"]
    (folder / "bundle.json").write_text(json.dumps(manifest))


def swapped_classes_with_canaries_of_their_own(folder: Path, mark: Path) -> None:
    """As a training on exchanged folders leaves them: model and reference images agree with one another."""
    swap = np.array([0, 3, 2, 1])
    canary = Canary.from_bytes((folder / "canary.npz").read_bytes())
    other = Canary(canary.images, swap[canary.labels], canary.probabilities[:, swap])
    (folder / "canary.npz").write_bytes(other.to_bytes())
    rewire(folder, set_masks(lambda masks: masks[..., swap]))


def other_label_order(folder: Path, mark: Path) -> None:
    rehash(folder, labels=["meningioma", "glioma", "notumor", "pituitary"])


def retouched_weights(folder: Path, mark: Path) -> None:
    """The classes are the same, the probabilities are not."""
    rewire(folder, set_masks(lambda masks: masks * np.float32(0.7)))


def wrong_input_size(folder: Path, mark: Path) -> None:
    def narrow(model: onnx.ModelProto) -> None:
        for axis in (1, 2):
            model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 32
        for attribute in model.graph.node[1].attribute:  # so that the rest of the network fits
            attribute.ints[:] = [4, 4]

    rewire(folder, narrow)


def manifest_of_another_size(folder: Path, mark: Path) -> None:
    rehash(folder, image_size=128)


def empty_network(folder: Path, mark: Path) -> None:
    (folder / "model.onnx").write_bytes(b"")
    rehash(folder)


def empty_manifest(folder: Path, mark: Path) -> None:
    (folder / "bundle.json").write_bytes(b"")


def flipped_byte(folder: Path, mark: Path) -> None:
    data = bytearray((folder / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "model.onnx").write_bytes(data)


def outputs_missing(folder: Path, mark: Path) -> None:
    rewire(folder, lambda model: model.graph.output.pop() and None)


def code_in_a_pickle(folder: Path, mark: Path) -> None:
    (folder / "model.pkl").write_bytes(pickle.dumps(Payload(mark)))
    rehash(folder, "model.pkl")


def code_among_the_canaries(folder: Path, mark: Path) -> None:
    with (folder / "canary.npz").open("wb") as file:
        np.savez(file, images=np.array([Payload(mark)], object), labels=np.zeros(1), probabilities=np.zeros((1, 4)))
    rehash(folder)


def code_in_place_of_the_network(folder: Path, mark: Path) -> None:
    (folder / "model.onnx").write_bytes(pickle.dumps(Payload(mark)))
    rehash(folder)


def foreign_operator(folder: Path, mark: Path) -> None:
    """An operator that only a library of somebody else's would bring."""

    def add(model: onnx.ModelProto) -> None:
        model.graph.node[0].domain = "com.example.code"
        model.opset_import.append(onnx.helper.make_opsetid("com.example.code", 1))

    rewire(folder, add)


BROKEN = (
    *(nan_weights, one_nan_weight, swapped_classes, swapped_classes_without_canaries),
    *(swapped_classes_with_canaries_of_their_own, other_label_order),
    *(retouched_weights, wrong_input_size, manifest_of_another_size, empty_network, empty_manifest, flipped_byte),
    *(outputs_missing, code_in_a_pickle, code_among_the_canaries, code_in_place_of_the_network, foreign_operator),
)


def failures(api: Api) -> float:
    lines = api.client.get("/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith("neuroloop_model_reload_failures_total ")))


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    plain = write_bundle(folder / "plain")
    return write_bundle(folder / "with-canaries", canary=canary_of(plain))


def test_no_broken_model_serves_and_the_old_one_answers_all_the_while(
    services, sound, register, mlflow_uri, tmp_path, caplog
):
    client = MlflowClient(mlflow_uri, mlflow_uri)
    good = register(sound)
    services.registry.set_alias("champion", good)
    answers, stop = [], threading.Event()

    def ask(api: Api) -> None:
        while not stop.wait(0.1):
            answers.append(api.predict(head("glioma")))

    reasons = {}
    with serving(services) as api:
        assert api.client.get("/v1/model").json()["version"] == good
        asking = threading.Thread(target=ask, args=(api,))
        asking.start()
        try:
            for breaking in BROKEN:
                # Registered as a sound one and broken in the artifact store, so that only the server stands in between.
                broken = write_bundle(tmp_path / breaking.__name__, canary=canary_of(sound))
                version = register(broken)
                mark = tmp_path / f"{breaking.__name__} ran"
                breaking(broken, mark)
                run = client.get_model_version("brain-tumor-classifier", version).run_id
                client.log_artifacts(run, str(broken), "bundle")
                before, seen = failures(api), len(answers)
                caplog.clear()
                services.registry.set_alias("champion", version)
                wait(lambda n=before: failures(api) > n, 60)
                wait(lambda n=seen: len(answers) > n + 1)
                assert api.client.get("/v1/model").json()["version"] == good, breaking.__name__
                assert not mark.exists(), breaking.__name__
                logged = [each.exc_info[1] for each in caplog.records if each.exc_info and "does not load" in each.msg]
                reasons[breaking.__name__] = str(logged[-1])
        finally:
            stop.set()
            asking.join()
        # A sound one after all of them is taken.
        services.registry.set_alias("champion", register(sound))
        wait(lambda: api.client.get("/v1/model").json()["version"] != good)
    assert {answer.status_code for answer in answers} == {201}
    assert {answer.json()["model_version"] for answer in answers} <= {good}
    for name, words in {
        "nan_weights": "no number",
        "one_nan_weight": "no number",
        "swapped_classes": "is called",
        "swapped_classes_without_canaries": "meningioma, pituitary",
        "swapped_classes_with_canaries_of_their_own": "meningioma, pituitary",
        "other_label_order": "labels",
        "retouched_weights": "otherwise than at its building",
        "wrong_input_size": "another image size",
        "manifest_of_another_size": "another image size",
        "empty_network": "cannot be loaded",
        "empty_manifest": "not valid",
        "flipped_byte": "damaged",
        "outputs_missing": "other inputs or outputs",
        "code_in_a_pickle": "a bundle holds only",
        "code_among_the_canaries": "canaries cannot be read",
        "code_in_place_of_the_network": "cannot be loaded",
        "foreign_operator": "cannot be loaded",
    }.items():
        assert words in reasons[name], (name, reasons[name])


@pytest.mark.parametrize("breaking", BROKEN, ids=lambda one: one.__name__)
def test_a_broken_bundle_is_refused_by_its_loader(sound: Path, tmp_path: Path, breaking):
    folder = write_bundle(tmp_path / "broken", canary=canary_of(sound))
    Bundle.load(folder)
    breaking(folder, tmp_path / "ran")
    if breaking in (swapped_classes_without_canaries, swapped_classes_with_canaries_of_their_own):
        # Only a served model can tell: the test above.
        assert (Bundle.load(folder).canary is None) is (breaking is swapped_classes_without_canaries)
        return
    with pytest.raises(Exception) as caught:  # noqa: PT011 the type is asserted on
        Bundle.load(folder)
    assert type(caught.value).__name__ in ("InvalidBundle", "OutdatedBundle")
    assert not (tmp_path / "ran").exists()
