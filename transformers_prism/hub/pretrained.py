"""A draft's repository as a whole: loading it with every check, saving it with all that others need, pushing it."""

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedModel
from transformers import initialization as init

from ..configuration_prism import PrismConfig
from ..policy.settings import default_tree_settings
from ..transformers_names import CACHE_NAMES, call, mark_as_own, name_of, revision_of
from ..tried_releases import errors_tell_of_untried_release
from .files import (
    AUTO_MAP,
    FINAL_NORM,
    find_file,
    remove_outdated_weights,
    upload,
    weight_files,
    write_published_files,
)
from .loading import check_headers, check_names_and_shapes, check_values, complete_tree_settings, found_at

# What save_pretrained() hands on to push_to_hub().
_HUB_ARGUMENTS = "repo_id token private revision create_pr commit_message commit_description tags".split()


def default_generation_config(config: PrismConfig) -> GenerationConfig:
    """A draft's default generation settings."""
    # Built afresh: a configuration that transformers derives from the model's loses its tree settings on reload.
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    generation_config = GenerationConfig(**ids, **default_tree_settings())
    mark_as_own(generation_config)
    return generation_config


class PrismPreTrainedModel(PreTrainedModel):
    """Loading, saving, pushing and weight initialisation of a draft."""

    config: PrismConfig
    config_class = PrismConfig
    base_model_prefix = ""
    _no_split_modules = ["PrismProcessingModule"]
    _skip_keys_device_placement = list(CACHE_NAMES)
    _supports_sdpa = True
    _supports_attention_backend = True

    # Content of about.json for a draft that was converted from another form.
    about: dict | None = None
    # Where it was loaded from: a folder or repository, and arguments of the download.
    loaded_from: tuple[str, dict] | None = None

    # Writes the card of a folder with new weights. The package sets it: a draft's copy of the code cannot write cards.
    write_card: Callable[[Path], object] | None = None

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        draft_to_target = getattr(module, "draft_to_target", None)  # of a draft with a vocabulary of its own
        if draft_to_target is not None:
            init.copy_(draft_to_target, torch.arange(draft_to_target.shape[0]))

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """Load a draft; as `PreTrainedModel.from_pretrained`, but no weight may be missing, unknown or not finite.

        Raises:
            OSError: if any file cannot be found or downloaded, including generation_config.json with the tree settings.
            ValueError: if the configuration is not of a draft; listing the weights that are missing, unknown or of
                another shape, before memory is taken for them; naming a weight that holds NaN or infinity. Also if an
                index of shards names files elsewhere.
        """
        source = kwargs.get("pretrained_model_name_or_path", args[0] if args else None) or ""
        # Sizes are compared here, so that the error itself names them.
        ignores_sizes = kwargs.pop("ignore_mismatched_sizes", False)
        with errors_tell_of_untried_release():
            check_headers(cls, source, ignores_sizes, **kwargs)
            draft, info = super().from_pretrained(
                *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        other_shapes = [] if ignores_sizes else info["mismatched_keys"]
        check_names_and_shapes(info["missing_keys"], info["unexpected_keys"], other_shapes)
        check_values(draft, source)
        complete_tree_settings(draft, source, **kwargs)
        draft.loaded_from = found_at(source, **kwargs)
        name, where = draft.loaded_from
        call(draft.config, name_of(draft.config) or name, where.get("revision"))
        return (draft, info) if output_loading_info else draft

    def save_pretrained(self, save_directory, is_main_process: bool = True, **kwargs):
        """Save the whole repository: weights, configurations, the code that runs them, custom_generate, card, metrics,
        licence; as `PreTrainedModel.save_pretrained`.

        `AutoModel.from_pretrained(save_directory, trust_remote_code=True)` works without this package.
        """
        push_to_hub = kwargs.pop("push_to_hub", False)
        hub_arguments = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
        self.config.auto_map = dict(AUTO_MAP)
        pushed = {name: kwargs[name] for name in ("state_dict", "variant", "max_shard_size") if name in kwargs}
        if pushed.get("state_dict") is not None:  # saving empties it
            pushed["state_dict"] = dict(pushed["state_dict"])
        # Loading may leave weights in another order; sorted, they fall into the same shards again.
        kwargs.setdefault("state_dict", dict(sorted(self.state_dict().items())))
        before = weight_files(save_directory)
        super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        if is_main_process:
            remove_outdated_weights(save_directory, before)
            source, _ = self._source()
            if Path(source).is_absolute() and not Path(source).is_dir():
                warnings.warn(f"what lay beside the draft's weights is not saved with them: {source} is gone", stacklevel=2)
            target_name = (self.config.target_fingerprint or {}).get("name")
            write_published_files(save_directory, self._find_file, target_name, self.write_card, self.about)
            if (norm := self.target_final_norm()) is not None:
                save_file({FINAL_NORM.removesuffix(".safetensors"): norm}, Path(save_directory) / FINAL_NORM)
        if push_to_hub and is_main_process:
            repo_id = hub_arguments.pop("repo_id", None) or Path(save_directory).name
            self._push(repo_id, pushed, **hub_arguments)

    def _source(self) -> tuple[str, dict]:
        return self.loaded_from or (name_of(self.config), {"revision": revision_of(self.config)})

    def _find_file(self, name: str) -> Path | None:
        """A file next to the weights that the draft was loaded from; None if there is none."""
        source, where = self._source()
        return find_file(source, name, **where)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ):
        """Upload what [`~PrismDraftModel.save_pretrained`] writes in one commit, and return its `CommitInfo`. As
        `PreTrainedModel.push_to_hub`, but the card is the draft's own."""
        return self._push(
            repo_id,
            {"max_shard_size": max_shard_size},
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            tags=tags,
        )

    def _push(self, repo_id: str, saved_with: dict, tags=None, private=None, token=None, commit_message=None, **commit):
        """Push what saving with these arguments of [`~PrismPreTrainedModel.save_pretrained`] writes."""
        with tempfile.TemporaryDirectory() as scratch:
            # The card calls the draft by the name of its folder.
            folder = Path(scratch) / repo_id.split("/")[-1]
            self.save_pretrained(folder, **saved_with)
            source, commit["commit_message"] = name_of(self.config), commit_message or "Upload draft"
            return upload(folder, repo_id, tags, private, token, loaded_from=source, **commit)
