"""Merges a base model and a PEFT LoRA adapter in float32, one layer at a time.

The model is built without weights. PEFT's own code merges each module after its weights have been
read, and they are released when the next layer is requested. Merging into a quantized base loses
the fine-tune, so such a base is rejected.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcat.base.checkpoint import first_line, load_config
from qcat.errors import ExportError, ModelError
from qcat.gguf.architecture import EMBEDDING, HEAD, architecture
from qcat_convert.peft_adapter import (
    known_fields,
    plain_name,
    read_adapter_config,
    read_lora_tensors,
)
from qcat_convert.scales import Blocks, ScalesAdapter
from qcat_convert.source import Source
from qcat_convert.weights import Checkpoint, Rows, Shape

if TYPE_CHECKING:
    import torch

_PROBES = 4  # inputs of a module, to compare what it computes before and after it is merged
_TOLERANCE = 1e-4  # of the largest number that it computes; float32 keeps a hundredth of this


class Merger:
    """Yields a merged model's weights part by part: embedding, layers, norm, head.

    Args:
        source: result of `locate`.

    Raises:
        ExportError, ModelError: something is missing, unsupported or does not fit; names it.
    """

    def __init__(self, source: Source) -> None:
        import torch

        self._source = source
        self._checkpoint = Checkpoint(source.folder)
        self.config = load_config(source.folder, source.layers)
        """The base's transformers configuration, with the merged model's rows and layers."""
        self.architecture = architecture(self.config)
        """How its tensors are named in a GGUF."""
        self._origins = self._find_origins()
        model = self._skeleton()
        self.shapes: dict[str, Shape] = {n: tuple(p.shape) for n, p in model.named_parameters()}
        """Of the merged tensors by name; a head that is tied is not among them."""
        tied = self._origins[HEAD] == self._origins[EMBEDDING]
        self._scales = ScalesAdapter(source.adapter) if source.adapter and source.scales else None
        self._rounded: Blocks | None = None
        with torch.no_grad():
            if self._scales:
                self._scales.check(model)
                self._rounded = self._scales.rounded(
                    EMBEDDING, self._rows(model.model.embed_tokens)
                )
                if (trained := self._scales.whole(EMBEDDING)) is not None:
                    model.model.embed_tokens.weight = trained
                    if tied:
                        model.lm_head.weight = trained
            elif source.adapter:
                model = self._adapted(model, source.adapter, tied)
            self._model = model
        embedding, head = model.model.embed_tokens, model.lm_head
        self.embedding_scale = float(getattr(embedding, "scalar_embed_scale", 1))
        """Factor for embeddings before the model's first layer, as in Gemma."""
        self.tied = embedding.weight is head.weight or self.embedding().equals(self.head())
        """Whether head and embedding hold the same numbers: then the GGUF keeps them once. The
        numbers decide, not the config: an adapter that saved one of the two unties them."""
        self.shapes.pop(HEAD, None)
        if not self.tied:
            self.shapes[HEAD] = tuple(head.weight.shape)

    def embedding(self) -> Rows:
        """The token embeddings."""
        if self._rounded:
            return Rows(self._rounded, self._rounded.shape[0])
        return self._rows(self._model.model.embed_tokens)

    def layers(self) -> Iterator[Any]:
        """The merged decoder layers; each loses its weights again when the next one is requested.

        Raises:
            ExportError: the adapter cannot be merged.
        """
        adapter = self._source.adapter
        for number, layer in enumerate(self._model.model.layers):
            self._read(layer)
            if self._scales:
                self._scales.apply(layer, f"model.layers.{number}")
            elif adapter:
                self._merge_below(layer, adapter)
            yield layer
            layer.to("meta")

    def norm(self) -> Any:
        """The norm before the head."""
        norm = self._model.model.norm
        self._read(norm)
        if self._scales:
            self._scales.apply(norm, "model.norm")
        return norm

    @property
    def blocks(self) -> Mapping[str, Blocks]:
        """The Q4_0 matrices of the embedding and the last requested layer, by tensor name."""
        embedding = {EMBEDDING: self._rounded} if self._rounded else {}
        return embedding | (self._scales.blocks if self._scales else {})

    @property
    def quantized(self) -> Collection[str]:
        """Names of all such matrices of the model."""
        return self._scales.matrices if self._scales else ()

    def head(self) -> Rows:
        """The head's rows, also if they are the embedding's."""
        return self._rows(self._model.lm_head)

    def _find_origins(self) -> dict[str, str]:
        """Which of the checkpoint's tensors embedding and head are.

        Tied ones are the same tensor, whichever the checkpoint has, unless it has both and they
        differ, as in transformers.
        """
        stored, count = self._checkpoint.shapes, self.config.vocab_size
        apart = {EMBEDDING: EMBEDDING, HEAD: HEAD}
        if not self.config.tie_word_embeddings:
            return apart
        if EMBEDDING in stored and HEAD in stored:
            embedding, head = (self._checkpoint.rows(name, count) for name in apart)
            if not embedding.equals(head):
                return apart
        return dict.fromkeys(apart, EMBEDDING if EMBEDDING in stored else HEAD)

    def _skeleton(self) -> Any:
        """The base's model with zeros that take no memory for weights."""
        import torch
        from accelerate import init_empty_weights
        from torch import nn
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        stored_rows, self.config.vocab_size = self.config.vocab_size, self._source.vocabulary_rows
        with init_empty_weights():
            made = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                self.config, dtype=torch.float32
            )
        model: Any = made.eval()
        parameters: dict[str, nn.Parameter] = {}
        missing: dict[str, tuple[Shape | None, Shape]] = {}
        for prefix, module in model.named_modules():
            for key, parameter in module.named_parameters(recurse=False):
                origin = self._origins.setdefault(f"{prefix}.{key}", f"{prefix}.{key}")
                shape = tuple(parameter.shape)
                wanted = (stored_rows, shape[1]) if origin in (EMBEDDING, HEAD) else shape
                stored = self._checkpoint.shapes.get(origin)
                if stored != wanted:
                    missing[origin] = stored, wanted
                if origin not in parameters:
                    zeros = torch.zeros(()).expand(shape)
                    parameters[origin] = nn.Parameter(zeros, requires_grad=False)
                setattr(module, key, parameters[origin])
        if missing:
            name = min(missing)
            stored, wanted = missing[name]
            raise ModelError(
                f"base {self._source.folder}: {name} "
                + (f"has the shape {stored}, and" if stored else "is absent:")
                + f" {wanted} is expected by config.json ({len(missing)} such tensors): download "
                "it again, or save it with save_pretrained"
            )
        self._unread = {parameter: origin for origin, parameter in parameters.items()}
        """Parameters that have not been read from the checkpoint yet, and where they are."""
        return model

    def _adapted(self, model: Any, adapter: Path, tied: bool) -> Any:
        """The model with the adapter on its layers, and merged into embedding and head."""
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

        model = attach(model, adapter, self._source.base).eval().get_base_model()
        for parent, name in ((model.model, "embed_tokens"), (model, "lm_head")):
            module = getattr(parent, name)
            if isinstance(module, BaseTunerLayer):
                if tied:
                    raise changed(adapter)
                self._read(module)
                self._merge_checked(parent, name, adapter)
            elif isinstance(module, AuxiliaryTrainingWrapper):
                if not isinstance(module, ModulesToSaveWrapper):  # which replaces the base's
                    self._read(module)
                _merge_child(parent, name)
        return model

    def _merge_below(self, module: Any, adapter: Path) -> None:
        """Merge everything that PEFT has wrapped in a module."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        for name, child in module.named_children():
            if isinstance(child, BaseTunerLayer):
                self._merge_checked(module, name, adapter)
            else:
                self._merge_below(child, adapter)

    def _merge_checked(self, parent: Any, name: str, adapter: Path) -> None:
        """Merge one module, and check that it computes the same as with the separate adapter."""
        import torch

        wrapped = getattr(parent, name)
        probe = _probe(wrapped.get_base_layer())
        with torch.no_grad():
            before = wrapped(probe)
            _merge_child(parent, name)
            after = getattr(parent, name)(probe)
        if not bool(before.isfinite().all()):
            raise ExportError(
                f"adapter {adapter}: its weights of {name} are too large to compute with: the "
                "training diverged: lower its learning rate"
            )
        if not float((after - before).abs().max()) <= _TOLERANCE * float(before.abs().max()):
            raise changed(adapter)

    def _read(self, module: Any) -> None:
        """Fill a module's parameters, if they have not been read from the checkpoint yet."""
        from torch import nn

        for part in module.modules():
            for key, parameter in part.named_parameters(recurse=False):
                if parameter in self._unread:
                    numbers = self._numbers(self._unread[parameter])
                    setattr(part, key, nn.Parameter(numbers, requires_grad=False))

    def _numbers(self, origin: str) -> torch.Tensor:
        import torch

        if origin not in (EMBEDDING, HEAD):
            return self._checkpoint.read(origin)
        rows = self._checkpoint.rows(origin, self._source.vocabulary_rows)
        return torch.cat([chunk.float() for chunk in rows.chunks()])

    def _rows(self, module: Any) -> Rows:
        """The matrix of an embedding or a head."""
        count = self._source.vocabulary_rows
        origin = self._unread.get(module.weight)
        return self._checkpoint.rows(origin, count) if origin else Rows(module.weight.data, count)


def attach(model: Any, adapter: Path, base: str) -> Any:
    """A model with a LoRA adapter's tensors, none of them left over and none missing.

    Args:
        model: the base; parameters on the meta device may get their values later.
        adapter: folder of the adapter. Its `layer_replication` is ignored: the model has the layers
            already, and PEFT merges no others.
        base: name of the base, for messages.

    Raises:
        ExportError: the adapter does not fit the model.
    """
    from peft import (
        LoraConfig,
        PeftModel,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )

    said = read_adapter_config(adapter)
    tensors = read_lora_tensors(adapter, said)
    config = LoraConfig(**known_fields(adapter, said))
    config.layer_replication = None
    config.inference_mode = True
    where = f"adapter {adapter}: does not fit the base {base}"
    try:
        tuned = PeftModel(model, config, low_cpu_mem_usage=True)
    except ValueError as error:  # no module of the names that it was trained on
        raise ExportError(f"{where}: {first_line(error)}") from None
    # A model that sees pictures too has more in its tensors' names, which `plain_name` left out.
    names = {
        plain_name(name): name
        for name in get_peft_model_state_dict(tuned, save_embedding_layers=False)
    }
    tensors = {names.get(name, name): tensor for name, tensor in tensors.items()}
    _check_tensors(tuned, tensors, where)
    set_peft_model_state_dict(tuned, tensors, low_cpu_mem_usage=True)
    return tuned


def _check_tensors(tuned: Any, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Check that adapter and model have the same tensors, because PEFT ignores others."""
    from peft import get_peft_model_state_dict

    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in get_peft_model_state_dict(tuned, save_embedding_layers=False).items()
    }
    # PEFT may also have saved the layers of the base that are trained whole.
    places = {name.replace(".default.", ".") for name in tuned.state_dict()}
    stored_only = sorted(tensors.keys() - wanted.keys() - places)
    absent = sorted(wanted.keys() - tensors.keys())
    if stored_only or absent:
        what = [f"it stores {stored_only[0]}"] if stored_only else []
        what += [f"{absent[0]} is expected"] if absent else []
        raise ExportError(
            f"{where}: {len(stored_only) + len(absent)} tensors are in one of them alone: "
            f"{', and '.join(what)}: name the base that it was trained on with --base, or save "
            "the adapter anew"
        )
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != wanted.get(name, tuple(tensor.shape)):
            raise ExportError(
                f"{where}: {name} has the shape {tuple(tensor.shape)}, not {wanted[name]}: "
                "name the base that it was trained on with --base"
            )


def _merge_child(parent: Any, name: str) -> None:
    """Replace a PEFT wrapper by its merged module, as merge_and_unload does.

    That method itself processes a whole model at once.
    """
    module = getattr(parent, name)
    if hasattr(module, "unload_and_optionally_merge_module"):
        merged = module.unload_and_optionally_merge_module(True, False, None)
    else:
        module.merge()
        merged = module.get_base_layer()
    setattr(parent, name, merged)


def _probe(layer: Any) -> torch.Tensor:
    """A test input for an embedding or a linear layer."""
    import torch

    if hasattr(layer, "num_embeddings"):
        return torch.arange(_PROBES)
    return torch.randn(_PROBES, layer.in_features, generator=torch.Generator().manual_seed(0))


def changed(adapter: Path) -> ExportError:
    """The error of an adapter that cannot be merged without a loss."""
    return ExportError(
        f"adapter {adapter}: merging changes what the model computes, as LoRA on a tied head "
        "or embedding does: train without lm_head and embed_tokens in target_modules"
    )
