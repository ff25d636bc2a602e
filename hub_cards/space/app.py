"""The page of `transformers-prism demo --web` as a Space. TARGET and DRAFT may name other models than the shipped ones."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# Where the package lies beside this file, as the README tells, it needs no installation.
sys.path.insert(0, str(HERE))

from transformers_prism.cli.web import launch, make_page  # noqa: E402

draft = os.environ.get("DRAFT") or str(HERE / "draft")
page = make_page(os.environ.get("TARGET") or "HuggingFaceTB/SmolLM2-135M-Instruct", draft)

if __name__ == "__main__":
    launch(page)
