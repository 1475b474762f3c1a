"""MLflow's datasets, logged models and model registry.

In the registry, an alias names the newest model of each budget.

Every model and every registered version has the name of its delivery as a tag, like runs. So
`remove` can delete the remains of an interrupted delivery.
"""

import json
import re
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clado.records.run_record import RunRecord

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput

LOADER = "clado.exporting.model"
DIGEST = 16
"""Characters of a slice's hash that name it.

The whole hash is in the profile. MLflow takes at most 36 characters.
"""


@dataclass(frozen=True)
class LoggedModel:
    """A model that MLflow has."""

    model_id: str
    """MLflow's id of the model."""
    location: str
    """URI of its files."""
    run_id: str
    """MLflow's id of the run that made it."""
    network: str
    """Name of the network, under which it is registered."""
    budget: str
    """Name of the budget."""

    @property
    def alias(self) -> str:
        """The budget's alias in the registry."""
        return alias_of(self.budget)


def alias_of(budget: str) -> str:
    """A budget's name as an alias, such as `2_25_bits`.

    MLflow allows only letters, digits, _ and -.
    """
    return re.sub(r"[^A-Za-z0-9-]+", "_", budget)


def inputs(record: RunRecord, data: Mapping[str, Any], only: Sequence[str] = ()) -> list["DatasetInput"]:
    """The slices of a record as MLflow's datasets, named by their hashes.

    Args:
        record: The record.
        data: Settings of the data. They say where the images are from.
        only: Names of the slices. All slices if empty.

    Returns:
        One dataset for each slice. Its context is `calibration`, `sensitivity` or `validation`.
    """
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import Dataset, DatasetInput, InputTag

    source = CodeDatasetSource({key: str(data[key]) for key in ("source", "path", "seed") if data.get(key) is not None})
    datasets = []
    for name, profile in record.data.items():
        if only and name not in only:
            continue
        dataset = MetaDataset(source, name, digest_of(record, name))  # type: ignore[abstract]  # declares a profile, has none
        entity = Dataset(**dataset.to_dict(), profile=json.dumps(profile))
        datasets.append(DatasetInput(entity, [InputTag("mlflow.data.context", name.removesuffix("_set"))]))
    return datasets


def digest_of(record: RunRecord, name: str) -> str | None:
    """The short hash of one of a record's slices. None if the record does not have it."""
    return record.data[name]["sha256"][:DIGEST] if name in record.data else None


def log_model(
    client: "MlflowClient", experiment_id: str, run_ids: Sequence[str], budget: str, folder: Path, tags: Mapping[str, str]
) -> LoggedModel:
    """Logs the folder of an `export_model` as a model.

    The signature and the requirements are read from the folder. MLflow would take half a minute to
    infer them.

    Args:
        client: Client of the store.
        experiment_id: MLflow's id of the experiment.
        run_ids: Runs that show the model as an output. The first one is its source.
        budget: Name of the budget.
        folder: The folder.
        tags: Tags of the model.

    Returns:
        The logged model.
    """
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    from clado.exporting.model import read_model

    document, name = read_model(folder), alias_of(budget)
    num_classes = document["num_classes"]  # None without logits
    output_shape = document.get("output_shape") if num_classes is None else [num_classes]
    inputs_schema, outputs_schema = (
        None if shape is None else Schema([TensorSpec(np.dtype("float32"), (-1, *shape))])
        for shape in (document["image_shape"], output_shape)
    )
    entity = client.create_logged_model(experiment_id, name, run_ids[0], dict(tags), {"budget": budget})
    model = Model(run_id=run_ids[0], model_id=entity.model_id, artifact_path=entity.artifact_location)
    with tempfile.TemporaryDirectory(prefix="clado-mlflow-") as temporary, warnings.catch_warnings():
        # warnings of MLflow's own type hints, and of the example input that the signature replaces
        warnings.simplefilter("ignore")
        from mlflow import pyfunc

        pyfunc.save_model(
            f"{temporary}/model", loader_module=LOADER, data_path=str(folder), mlflow_model=model,
            signature=ModelSignature(inputs_schema, outputs_schema),
            input_example=np.zeros((1, *document["image_shape"]), np.float32),
            pip_requirements=document["requirements"],
        )  # fmt: skip
        client.log_model_artifacts(entity.model_id, f"{temporary}/model")
    client.finalize_logged_model(entity.model_id, "READY")
    for run_id in run_ids:
        client.log_outputs(run_id, [LoggedModelOutput(entity.model_id, 0)])
    return LoggedModel(entity.model_id, entity.artifact_location, run_ids[0], document["name"], budget)


def register(client: "MlflowClient", model: LoggedModel, recorded: str, tags: Mapping[str, str], description: str = "") -> None:
    """Registers a logged model as the next version of its network.

    The version gets the alias of its budget, unless the version of a newer run has it. A delivery
    may come late.

    Args:
        client: Client of the store.
        model: The logged model.
        recorded: Time of the run, in ISO 8601 and UTC.
        tags: Tags of the version.
        description: A description in words.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    try:
        client.create_registered_model(model.network)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    owner = client.get_registered_model(model.network).aliases.get(model.alias)
    version = client.create_model_version(
        model.network, model.location, model.run_id, model_id=model.model_id,
        tags={**tags, "budget": model.budget, "recorded": recorded}, description=description or None,
    )  # fmt: skip
    versions = [{"name": model.network, "version": version.version}]
    client.set_logged_model_tags(
        model.model_id, {MLFLOW_MODEL_VERSIONS: json.dumps(versions)}
    )  # the form that MLflow's page expects
    if owner is None or client.get_model_version(model.network, owner).tags.get("recorded", "") <= recorded:
        client.set_registered_model_alias(model.network, model.alias, version.version)


def remove(client: "MlflowClient", experiment_id: str, tag: str, value: str) -> None:
    """Deletes the models and the registered versions with a tag.

    Aliases go with their versions.
    """
    for version in client.search_model_versions(f"tags.`{tag}` = '{value}'"):
        client.delete_model_version(version.name, version.version)
    for model in client.search_logged_models([experiment_id], f"tags.{tag} = '{value}'"):
        client.delete_logged_model(model.model_id)
