import importlib
import subprocess
import sys

import pytest


@pytest.mark.processes
def test_importing_the_package_does_no_work():
    code = (
        "import sys, icrouting; print(sum("
        "name.split('.')[0] in ('torch', 'transformers', 'pandas') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0"
    assert not done.stderr


def test_public_names_are_there():
    import icrouting

    for name in icrouting.__all__:
        assert getattr(icrouting, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = icrouting.nonsense


def test_without_lm_evaluation_harness_its_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)
    monkeypatch.delitem(sys.modules, "icrouting.lm_eval", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'icrouting\[lm-eval\]'"):
        importlib.import_module("icrouting.lm_eval")
