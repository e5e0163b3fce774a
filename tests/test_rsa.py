"Export for representational similarity analysis."

import numpy as np
import pytest
import torch

from dainv.rsa import as_rsatoolbox, export_rsa


def test_matrices_and_names_come_back(tmp_path):
    features = {"a/b": torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]])}
    with np.load(export_rsa(features, tmp_path / "x.npz", conditions=["cat", "dog", "cat"])) as held:
        np.testing.assert_allclose(held["rdm/a/b"], [[0, 2, 8], [2, 0, 10], [8, 10, 0]])
        assert held["conditions"].tolist() == ["cat", "dog", "cat"] and held["layers"].tolist() == ["a/b"]
    with pytest.raises(ValueError, match="conditions 2"):
        export_rsa(features, tmp_path / "y.npz", conditions=["cat", "dog"])
    with pytest.raises(ValueError, match=".npz"):
        export_rsa(features, tmp_path / "y.npy")
    assert not (tmp_path / "y.npz").exists()


def test_rsatoolbox_gets_them_or_is_asked_for(tmp_path):
    file = export_rsa({"a": torch.eye(3)}, tmp_path / "x.npz")
    try:
        data, matrices = as_rsatoolbox(file)
    except ImportError as error:
        assert "pip install rsatoolbox" in str(error)
    else:
        assert matrices.n_rdm == len(data) == 1
