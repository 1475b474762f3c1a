"""What MLflow has beside runs: datasets, logged models, and the registry, where an alias names each budget's newest model.

Called by `tracking`, with a client. Every model and every registered version carries the name of its delivery, as runs do, so
that what an interrupted delivery left behind is found and deleted.
"""

import json
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clado.records import RunRecord

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

LOADER = "clado.exporting.model"
DIGEST = 16  # characters of a slice's hash that name it; the whole hash is in the profile. MLflow takes 36


@dataclass(frozen=True)
class Logged:
    """A logged model: MLflow's id, where its files are, the name of its network and its budget's alias there."""

    model_id: str
    location: str
    run_id: str
    network: str
    budget: str

    @property
    def alias(self) -> str:
        """As `alias_of`."""
        return alias_of(self.budget)


def alias_of(budget: str) -> str:
    """A budget's name as an alias, of which MLflow takes letters, digits, _ and - alone: `2.25 bits` is `2_25_bits`."""
    return re.sub(r"[^A-Za-z0-9-]+", "_", budget)


def inputs(record: RunRecord, data: Mapping[str, Any], only: Sequence[str] = ()) -> list["DatasetInput"]:
    """The slices that a record names (or some of them), by their hashes, each with its context: calibration, validation, …

    `data` are the settings that say where the images are from.
    """
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = CodeDatasetSource({key: str(data[key]) for key in ("source", "path", "seed") if data.get(key) is not None})
    found = []
    for name, part in record.data.items():
        if only and name not in only:
            continue
        described = MetaDataset(source, name, digest_of(record, name))  # type: ignore[abstract]  # declares a profile, has none
        entity = Dataset(**described.to_dict(), profile=json.dumps(part))
        found.append(DatasetInput(entity, [InputTag("mlflow.data.context", name.removesuffix("_set"))]))
    return found


def digest_of(record: RunRecord, name: str) -> str | None:
    """The short hash of one of a record's slices; None where it does not name it."""
    return record.data[name]["sha256"][:DIGEST] if name in record.data else None


def log_model(
    client: "MlflowClient", experiment_id: str, run_ids: Sequence[str], budget: str, folder: Path, tags: Mapping[str, str]
) -> Logged:
    """Logs a folder of `export.model` as a model that the first run made, and shows it as an output of all of them.

    The signature and the requirements are the folder's own: MLflow would take half a minute to infer them.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec
    from numpy import dtype

    from clado.exporting.model import read_model

    document = read_model(folder)
    float32 = dtype("float32")
    images, logits = (-1, *document["image_shape"]), (-1, document["num_classes"])
    signature = ModelSignature(Schema([TensorSpec(float32, images)]), Schema([TensorSpec(float32, logits)]))
    made = client.create_logged_model(
        experiment_id, name=alias_of(budget), source_run_id=run_ids[0], tags=dict(tags), params={"budget": budget}
    )
    described = Model(run_id=run_ids[0], model_id=made.model_id, artifact_path=made.artifact_location)
    with tempfile.TemporaryDirectory(prefix="clado-mlflow-") as name, warnings.catch_warnings():
        # its import complains of MLflow's own type hints, and its saving of no example input: the signature says as much
        warnings.simplefilter("ignore")
        from mlflow import pyfunc

        pyfunc.save_model(
            f"{name}/model", loader_module=LOADER, data_path=str(folder), mlflow_model=described, signature=signature,
            pip_requirements=document["requirements"],
        )  # fmt: skip
        client.log_model_artifacts(made.model_id, f"{name}/model")
    client.finalize_logged_model(made.model_id, "READY")
    for run_id in run_ids:
        client.log_outputs(run_id, [LoggedModelOutput(made.model_id, 0)])
    return Logged(made.model_id, made.artifact_location, run_ids[0], document["name"], budget)


def register(client: "MlflowClient", model: Logged, recorded: str, tags: Mapping[str, str]) -> None:
    """Makes a logged model the next version of its network, and gives it its budget's alias unless a newer run has that.

    `recorded` is when the run was, in ISO 8601 and UTC: a delivery may come late.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    try:
        client.create_registered_model(model.network)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    owner = client.get_registered_model(model.network).aliases.get(model.alias)
    made = client.create_model_version(
        model.network, model.location, model.run_id, model_id=model.model_id,
        tags={**tags, "budget": model.budget, "recorded": recorded},
    )  # fmt: skip
    versions = [{"name": model.network, "version": made.version}]
    client.set_logged_model_tags(model.model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(versions)})  # as MLflow's page expects
    if owner is None or client.get_model_version(model.network, owner).tags.get("recorded", "") <= recorded:
        client.set_registered_model_alias(model.network, model.alias, made.version)


def remove(client: "MlflowClient", experiment_id: str, tag: str, value: str) -> None:
    """Deletes the models and the registered versions that carry a tag; an alias of such a version goes with it."""
    for version in client.search_model_versions(f"tags.`{tag}` = '{value}'"):
        client.delete_model_version(version.name, version.version)
    for model in client.search_logged_models([experiment_id], f"tags.{tag} = '{value}'"):
        client.delete_logged_model(model.model_id)
