"""Loads one component of a base alone. Missing, surplus or misshapen tensors are refused."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin, SchedulerMixin, UNet2DConditionModel
from safetensors import SafetensorError, safe_open
from torch.nn.modules.module import register_module_parameter_registration_hook

from runtime.messages import first_line
from sdxl import BaseError
from sdxl.base import Base, ModelSource, find_weights
from sdxl.original_names import modern_name
from sdxl.single_file import SingleFile
from sdxl.tensor_files import check_digest
from sdxl.tokenizers import VOCAB_SIZE


def load_unet(source: ModelSource, dtype: torch.dtype) -> UNet2DConditionModel:
    """A UNet, on the CPU, in ``dtype``, in eval mode.

    Raises:
        BaseError: missing, damaged, or no SDXL.
    """
    return _load(UNet2DConditionModel, source, dtype)


def load_vae(source: ModelSource, dtype: torch.dtype) -> AutoencoderKL:
    """A VAE, as ``load_unet``."""
    return _load(AutoencoderKL, source, dtype)


def load_text_encoders(base: Base, dtype: torch.dtype) -> tuple[Any, Any]:
    """(CLIPTextModel, CLIPTextModelWithProjection) of a base, as ``load_unet``."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection
    from transformers.utils import logging

    logging.disable_progress_bar()
    return (
        _load(CLIPTextModel, base.text_encoder, dtype),
        _load(CLIPTextModelWithProjection, base.text_encoder_2, dtype),
    )


def load_tokenizers(base: Base) -> tuple[Any, Any]:
    """Both tokenizers, refused where their vocabulary is not their encoder's.

    (transformers loads a tokenizer folder without a vocabulary silently, as two tokens.)
    """
    from transformers import CLIPTokenizer

    def load(name: str) -> Any:
        files = base.tokenizer(name)
        folder, pad = files.folder, files.pad_token
        parts = files.parts()  # or it says what is damaged, as the library does not
        try:
            changes = {} if pad is None else {"pad_token": pad}
            tokenizer = CLIPTokenizer.from_pretrained(str(folder), local_files_only=True, **changes)
        except Exception as error:  # transformers raises anything of a folder it cannot read
            reason = first_line(error)
            raise BaseError(f"{folder}: no tokenizer can be read from it: {reason}") from error
        encoder = name.replace("tokenizer", "text_encoder")
        expected = base.model(encoder).config.get("vocab_size", VOCAB_SIZE)
        if len(tokenizer) != expected:
            raise BaseError(
                f"{folder}: {len(tokenizer)} tokens, where {encoder} has {expected}: is its "
                "vocab.json missing?"
            )
        tokenizer.model_max_length = parts["model_max_length"]
        return tokenizer

    return load("tokenizer"), load("tokenizer_2")


def load_scheduler(
    base: Base, prediction_type: str | None = None, zero_snr: bool | None = None
) -> Any:
    """The sampling scheduler that the base names, as diffusers' pipeline would load it; with the
    prediction type and schedule of a fine-tune of it, if given (None: the base's).

    With ``zero_snr`` sampling starts at the last timestep ("trailing"): only there is the noise
    pure (Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", 3.3).

    Raises:
        BaseError: the base names no sampler that diffusers knows.
    """
    import diffusers

    config = base.scheduler_config
    name = str(config.get("_class_name"))
    kind: Any = getattr(diffusers, name, None)
    is_scheduler = isinstance(kind, type) and issubclass(kind, SchedulerMixin)
    if not is_scheduler:
        raise BaseError(f"{base}: unknown scheduler {name}")
    changes: dict[str, Any] = {}
    if prediction_type is not None:
        changes["prediction_type"] = prediction_type
    if zero_snr is not None:
        changes["rescale_betas_zero_snr"] = zero_snr
    if zero_snr:
        changes["timestep_spacing"] = "trailing"
    takes = inspect.signature(kind.__init__).parameters
    if unsupported := sorted(name for name in changes if name not in takes and changes[name]):
        warnings.warn(
            f"images are drawn without {', '.join(unsupported)}: the base's {kind.__name__} does "
            "not know it",
            stacklevel=2,
        )
    supported = {name: value for name, value in changes.items() if name in takes}
    try:
        return kind.from_config(config | supported)
    except Exception as error:  # diffusers raises anything of a config that it cannot take
        reason = f"its scheduler's config makes no {name}: {first_line(error)}"
        raise BaseError(f"{base}: {reason}") from error


def _load(kind: Any, source: ModelSource, dtype: torch.dtype) -> Any:
    """A model from its folder, or from a single file."""
    _ = source.config  # refused here where it is not SDXL's; the libraries say less
    if source.file is not None:
        model = _load_from_file(kind, source, source.file, dtype)
    else:
        model = _load_from_folder(kind, source.path, dtype)
        # The library's tensors lie in the mapped file as it happens to be laid out, and kernels
        # round otherwise at another alignment: the same weights are to give the same bits.
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    return model.eval().requires_grad_(False)


def _load_from_folder(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    weights = find_weights(folder)
    for path in weights.files:
        check_digest(path)
    named = "torch_dtype" if issubclass(kind, ModelMixin) else "dtype"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model, info = kind.from_pretrained(
                str(folder),
                variant=weights.variant,
                use_safetensors=True,
                output_loading_info=True,
                local_files_only=True,
                **{named: dtype},
            )
    except MemoryError:
        raise
    except Exception as error:  # the libraries raise anything of a folder that they cannot read
        raise BaseError(
            f"{folder}: its weights do not load as {kind.__name__}: {first_line(error)}"
        ) from error
    for fault in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := [n for n in map(str, info.get(fault, [])) if not n.endswith("position_ids")]:
            raise _weights_error(folder, fault.replace("_keys", ""), names)
    return model


def _weights_error(path: Path, fault: str, names: list[str]) -> BaseError:
    return BaseError(
        f"{path}: weights of another model, or damaged: {len(names)} tensors {fault}, "
        f"e.g. {min(names)}"
    )


def _load_from_file(
    kind: Any, source: ModelSource, single_file: SingleFile, dtype: torch.dtype
) -> Any:
    """A model by its config, with its tensors of a single file; no other tensor is read."""
    component, path = source.component, source.path
    check_digest(path)
    model = _without_weights(kind, source.config, path)
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    wanted = {modern_name(component, name): name for name in shapes}
    tensor_mappings = single_file.tensor_mappings(component)
    available = {name for mapping in tensor_mappings.values() for name in mapping.names or ()}
    surplus = [key for key, mapping in tensor_mappings.items() if mapping.names is None]
    for fault, names in (
        ("missing", [name for name in wanted if name not in available]),
        ("unexpected", [*surplus, *(available - wanted.keys())]),
    ):
        if names:
            raise _weights_error(path, fault, names)
    state = {}
    try:
        with safe_open(path, framework="pt") as file:
            for key, mapping in tensor_mappings.items():
                tensors = mapping.split(_scaled(file, key, mapping.scale)) if mapping.names else {}
                for name, tensor in tensors.items():
                    state[wanted[name]] = tensor.contiguous().to(dtype, copy=True)
    except (ValueError, SafetensorError) as error:
        raise BaseError(f"{path}: damaged: {error}") from error
    other = [
        f"{name} is {list(tensor.shape)}, and not {shapes[name]}"
        for name, tensor in state.items()
        if list(tensor.shape) != shapes[name]
    ]
    if other:
        raise _weights_error(path, "mismatched", other)
    model.load_state_dict(state, assign=True)
    return model


def _scaled(file: Any, key: str, scale: str | None) -> torch.Tensor:
    """A tensor of a file; a scaled fp8 weight is multiplied by its scale, in fp32."""
    tensor: torch.Tensor = file.get_tensor(key)
    if scale is None:
        return tensor
    factors: torch.Tensor = file.get_tensor(scale).float().flatten()
    return tensor.float() * factors.reshape(-1, *[1] * (tensor.ndim - 1))


def model_without_weights(component: str, config: dict[str, Any]) -> Any:
    """A model on the meta device: modules with their names and shapes, without weights."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kinds = {
        "unet": UNet2DConditionModel,
        "vae": AutoencoderKL,
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    return _without_weights(kinds[component], config)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """While entered, parameters of new modules have no data; buffers, which no file holds, do."""

    def move(module: Any, name: str, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        return torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(move)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


def _without_weights(kind: Any, config: dict[str, Any], path: Path | None = None) -> Any:
    """A model whose parameters have shapes and no data yet; its buffers are as they must be."""
    try:
        with _parameters_on_meta():
            if issubclass(kind, ModelMixin):
                return kind.from_config(config)
            return kind(kind.config_class(**config))
    except MemoryError:
        raise
    except Exception as error:  # the libraries raise anything of a config that they cannot take
        where = "" if path is None else f"{path}: "
        raise BaseError(
            f"{where}its config makes no {kind.__name__}: {first_line(error)}"
        ) from error
