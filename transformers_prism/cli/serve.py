"""The command `serve`: an OpenAI-compatible server whose answers are drafted."""

import logging
from typing import Annotated

import typer

from transformers_prism.cli.options import (
    Commands,
    DeviceOption,
    DraftOption,
    DtypeOption,
    PackedOption,
    log_information,
)


def serve(
    target: Annotated[
        str | None,
        typer.Argument(help="Hub id, folder or .gguf file; SmolLM2-135M-Instruct if absent.", show_default=False),
    ] = None,
    draft: DraftOption = None,
    host: Annotated[str, typer.Option(help="Address to listen on; any but loopback is open to others.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option("--served-model-name", help="The model's id for clients; TARGET if absent.", show_default=False)
    ] = None,
    model_timeout: Annotated[
        int, typer.Option(min=-1, help="Seconds without a request until the models are unloaded; 0 or -1 is never.")
    ] = -1,
    other_models: Annotated[
        bool, typer.Option("--other-models", help="Load other models that requests name, too, without a draft.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    packed: PackedOption = True,
    continuous_batching: Annotated[bool, typer.Option("--continuous-batching", hidden=True)] = False,
):
    """Serve a target with its draft behind an OpenAI-compatible URL, by way of `transformers serve`.

    POST /v1/chat/completions, /v1/completions and /v1/responses, streamed or not; GET /v1/models and /health.
    Requests wait for each other: continuous batching of transformers takes no draft.
    """
    from transformers_prism.cli.demo import SHIPPED_DRAFT
    from transformers_prism.serving import app as serving
    from transformers_prism.target import DEMO_HUB_ID

    if continuous_batching:
        raise ValueError(serving.NO_CONTINUOUS_BATCHING)
    logging.basicConfig(format="%(levelname)s:     %(message)s")
    log_information()
    listener = serving.listen(host, port)
    served = serving.ServedTarget(
        name=name or target or DEMO_HUB_ID,
        draft_name=draft or SHIPPED_DRAFT.name,
        load=lambda: load(target, draft, device, dtype, packed),
        model_timeout=model_timeout or -1,
        allows_other_models=other_models,
    )
    app = serving.build_app(served, device=device, dtype=dtype)
    address = f"[{host}]" if ":" in host else host
    typer.echo(f"Serving {served.name} with {served.draft_name} at http://{address}:{listener.getsockname()[1]}/v1")
    serving.run_server(app, listener)


def add_to(app: Commands) -> None:
    """Add the command to the command line."""
    app.command("serve")(serve)


def load(target_name: str | None, draft_name: str | None, device: str, dtype: str, packed: bool):
    """Target, tokenizer and draft, ready to answer: after one short answer, in which costs are measured.

    Args:
        target_name (`str`, *optional*): as for [`load_target`].
        draft_name (`str`, *optional*): folder or Hub id; None is the draft that the repository ships.
        device (`str`), dtype (`str`), packed (`bool`): as for [`load_pair`].
    """
    from transformers_prism.cli.demo import answer_once, load_pair

    models = load_pair(target_name, draft_name, packed, device, dtype)
    answer_once(*models)
    return models
