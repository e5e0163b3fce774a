"Writes the parameters cells of the run notebooks from the dataclasses that they belong to."

import json
from pathlib import Path

from dainv.evaluating import EvaluateParams
from dainv.measuring import MeasureParams
from dainv.options import parameters_cell
from dainv.pretraining import PretrainParams
from dainv.sweeping import SweepParams
from dainv.training import TrainParams

ROOT = Path(__file__).resolve().parents[1]
PARAMETERS = {
    "train": TrainParams,
    "pretrain": PretrainParams,
    "measure": MeasureParams,
    "evaluate": EvaluateParams,
    "pairs": SweepParams,
}


def write(notebook: str) -> None:
    "Puts the parameters of the dataclass into the cell with the tag `parameters`."
    path = ROOT / "nbs" / f"{notebook}.ipynb"
    content = json.loads(path.read_text())
    cell = next(c for c in content["cells"] if "parameters" in c["metadata"].get("tags", []))
    cell["source"] = parameters_cell(PARAMETERS[notebook]).splitlines(keepends=True)
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    for notebook in PARAMETERS:
        write(notebook)
