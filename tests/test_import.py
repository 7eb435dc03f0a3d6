"""Importing the package is cheap, and peft knows the method afterwards, whichever comes first."""

import subprocess
import sys

import pytest

KNOWN = "assert 'FUSION' in mapping.PEFT_TYPE_TO_CONFIG_MAPPING and 'FUSION' in mapping.PEFT_TYPE_TO_TUNER_MAPPING"
ORDERS = {
    "ours, then peft": "import fusion_adapters; from peft import mapping",
    "a room of ours alone": "from fusion_adapters.tuner.config import FusionConfig; from peft import mapping",
    "peft, then ours": "from peft import mapping; import fusion_adapters",
    # as transformers does when it is imported
    "ours, a look for peft, then peft": "import fusion_adapters, importlib.util as u; u.find_spec('peft'); from peft import mapping",
}


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_the_method_is_registered(order):
    done = run(
        f"{order}; {KNOWN}; import peft, pickle; assert peft.__spec__.loader is peft.__loader__; pickle.dumps(peft.LoraConfig())"
    )
    assert done.returncode == 0, done.stderr


def test_importing_the_package_and_asking_for_help_load_no_torch():
    for code in (
        "import fusion_adapters",
        "from fusion_adapters.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
    ):
        done = run(f"{code}\nimport sys; print(sorted({{'torch', 'peft', 'transformers'}} & set(sys.modules)))")
        assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
        assert not done.stderr, "something is printed that nobody asked for"


def test_every_public_name_is_there_and_another_is_not():
    import fusion_adapters

    for name in fusion_adapters.__all__:
        assert getattr(fusion_adapters, name) is not None and name in dir(fusion_adapters)
    with pytest.raises(AttributeError, match="no attribute 'FusionConfg'"):
        fusion_adapters.FusionConfg  # noqa: B018
