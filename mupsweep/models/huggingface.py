"""A causal language model of transformers: a config.json, scaled by the fields that hold its shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mupsweep.documents import parse_json
from mupsweep.errors import ConfigError, reason
from mupsweep.formatting import nearest
from mupsweep.models.inferred import ATTENTION, BLOCK, OUTPUT, InferredArchitecture
from mupsweep.models.shape import GQA_RULES, BaseShape, Size
from mupsweep.schema import one_of

if TYPE_CHECKING:
    from torch import nn

# What a config calls the parts of its shape, the usual name first.
FIELDS = {
    "width": ("hidden_size", "n_embd", "d_model", "dim"),
    "depth": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_kv_heads"),
    "head_dim": ("head_dim",),
    "ffn": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "d_ff"),
    "context": ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"),
    "vocab_size": ("vocab_size",),
}
# What configs of mixtures call their routed experts, and those that compute a token.
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "experts_per_token", "moe_top_k", "num_selected_experts")
NEEDED = ("width", "depth")
CONSTANTS = (OUTPUT, BLOCK, ATTENTION)
SCALED_BY = ("width", "depth", "heads")
# Keys of a file that name other code, or how weights of somebody else's are stored.
LEFT_OUT = ("auto_map", "quantization_config", "torch_dtype", "dtype", "architectures", "transformers_version")
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "sep_token_id")
KIND = "mupsweep.models.huggingface.HuggingFace"


@dataclass(frozen=True, kw_only=True)
class HuggingFace(InferredArchitecture):
    """Any model that transformers' AutoModelForCausalLM builds from a config.

    Attributes:
        config: the path of a config.json on a command line; its content in a stored sweep.
        width, depth, head_dim: of the base, head_dim being width / heads; 0 for the config's own. What else the config
            holds keeps its proportions to them.
        gqa_rule: what is held fixed at other widths, "fixed_ratio" (heads / kv_heads) or "fixed_kv_heads".
        fields: a key of FIELDS -> the config's name for it, where it is another; or a forward constant that the model
            has (output_multiplier, block_multiplier, attention_multiplier) -> its name, or 1/NAME where it divides.
        scaled: name of a further field that grows -> with what: width, depth or heads.
        settings: fields with other values than the config's, the same at every size.
    """

    config: Any = None
    width: int = 0
    depth: int = 0
    head_dim: int = 0
    gqa_rule: str = "fixed_ratio"
    fields: dict[str, Any] | None = None
    scaled: dict[str, Any] | None = None
    settings: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.config, Mapping):
            raise ConfigError(
                f"model.config={'null' if self.config is None else self.config}: name the config.json of a causal "
                "language model, as model.config=config.json"
            )
        one_of(self.gqa_rule, GQA_RULES, "model.gqa_rule")
        for key in self.fields or ():
            if key not in (*FIELDS, *CONSTANTS):
                raise ConfigError(f"model.fields.{key}: no part of a shape; {nearest(key, (*FIELDS, *CONSTANTS))}")
        for name, with_what in (self.scaled or {}).items():
            one_of(str(with_what), SCALED_BY, f"model.scaled.{name}")
            self._number(name, f"model.scaled.{name}")
        if not isinstance(self._values.get("model_type"), str):
            raise ConfigError("model.config has no model_type, which says what transformers builds")
        own = {"width": self._own("width"), "depth": self._own("depth")}
        heads = self._own("heads") if "heads" in self._names else 1
        if own["width"] % heads:
            raise ConfigError(f"model.config: its {heads} heads do not divide its width {own['width']}")
        for key, value in {**own, "head_dim": own["width"] // heads}.items():
            if not getattr(self, key):
                object.__setattr__(self, key, value)
        super().__post_init__()

    @property
    def where(self) -> str:
        return f"model.config ({self._values['model_type']})"

    @property
    def takes(self) -> frozenset[str]:
        return frozenset(CONSTANTS) & (self.fields or {}).keys()

    @property
    def base(self) -> BaseShape:
        if "heads" not in self._names:
            return BaseShape(self.width, self.depth, self.head_dim, 1, 4.0, self.context)
        heads = self.heads or self.width // self.head_dim
        kv_heads, rule = None, self.gqa_rule
        if "kv_heads" in self._names:
            kv_heads, group = self._own("kv_heads"), self._own("heads") // self._own("kv_heads")
            if kv_heads == 1:
                rule = "fixed_kv_heads"
            elif rule == "fixed_ratio" and heads % group:
                raise ConfigError(
                    f"model.width={self.width} has {heads} heads, which cannot share keys in groups of {group} as "
                    "those of model.config do: choose another width or head_dim, or model.gqa_rule=fixed_kv_heads"
                )
            elif rule == "fixed_ratio":
                kv_heads = heads // group
        ratio = self._own("ffn") / self._own("width") if "ffn" in self._names else 4.0
        return BaseShape(
            self.width, self.depth, self.head_dim, self.heads, ratio, self.context, kv_heads=kv_heads, gqa_rule=rule
        )

    def construct(self, size: Size, constants: Mapping[str, float]) -> nn.Module:
        try:
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError as error:
            raise ConfigError("model=huggingface needs transformers: pip install transformers") from error
        values = self.values(size, constants)
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        try:
            return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
        except ValueError as error:
            if "scaled_dot_product_attention" not in str(error):
                raise
            return AutoModelForCausalLM.from_config(config, attn_implementation="eager")

    def values(self, size: Size, constants: Mapping[str, float]) -> dict[str, Any]:
        """The fields of the config at a size."""
        ratios = {"width": size.width / self._own("width"), "depth": size.depth / self._own("depth")}
        shape = {"width": size.width, "depth": size.depth, "vocab_size": size.vocab_size}
        if "heads" in self._names:
            ratios["heads"] = size.heads / self._own("heads")
            shape |= {"heads": size.heads, "kv_heads": size.kv_heads}
            per_head = self._own("width") // self._own("heads")
            if "head_dim" in self._names:
                shape["head_dim"] = round(self._own("head_dim") * size.head_dim / per_head)
        if "ffn" in self._names:
            shape["ffn"] = size.ffn_width
        if "context" in self._names:
            shape["context"] = max(size.context, self._own("context"))
        values = dict(self._values)
        for name, value in values.items():  # a kind of attention for every layer, say
            if isinstance(value, list) and len(value) == self._own("depth"):
                values[name] = [value[i % len(value)] for i in range(size.depth)]
        for key, name in self._names.items():
            values[name] = shape[key]
        for name, with_what in (self.scaled or {}).items():
            values[name] = round(self._number(name, f"model.scaled.{name}") * ratios[str(with_what)])
        for constant, value in constants.items():
            name = str((self.fields or {})[constant])
            divides = name.startswith("1/")
            name = name.removeprefix("1/")
            own = self._number(name, f"model.fields.{constant}")
            values[name] = own / value if divides else own * value
        return {**values, **dict.fromkeys(TOKENS), "use_cache": False}

    def active(self, name: str) -> float:
        if ".experts." not in name:
            return 1.0
        experts, chosen = (
            next((value for name in names if isinstance(value := self._values.get(name), int) and value > 0), 1)
            for names in (EXPERTS, EXPERTS_PER_TOKEN)
        )
        return min(1.0, chosen / experts)

    def read(self, output: Any) -> Any:
        return output[0] if isinstance(output, tuple) else getattr(output, "logits", output)

    def remedy(self, constant: str) -> str:
        if constant == ATTENTION:
            return "hold head_dim fixed (model.heads=null), or name the field that holds it in model.fields"
        if constant == BLOCK:
            return "choose parametrization=mup, which leaves depth as it is, or name the field in model.fields"
        return (
            "untie the head where it is tied ('model.settings={tie_word_embeddings:false}'), choose "
            "parametrization.output=init, or name the field in model.fields"
        )

    @property
    def _values(self) -> dict[str, Any]:
        """The fields of the config, without those that name code."""
        values = {**self.config, **(self.settings or {})}
        return {
            name: value
            for name, value in values.items()
            if name not in LEFT_OUT and not name.startswith("_") and not name.endswith("_implementation")
        }

    @cached_property
    def _names(self) -> dict[str, str]:
        """Key of FIELDS -> the config's name for it, of those that it has."""
        names = {}
        for key, usual in FIELDS.items():
            given = (self.fields or {}).get(key)
            name = given or next((name for name in usual if self._values.get(name) is not None), None)
            if name is None and key in NEEDED:
                raise ConfigError(
                    f"model.config has none of {', '.join(usual)}: name its {key} as 'model.fields={{{key}:NAME}}'"
                )
            if name is not None:
                names[key] = str(name)
        names.setdefault("vocab_size", "vocab_size")
        return names

    def _own(self, key: str) -> int:
        """The value of a part of the shape in the config itself."""
        return int(self._number(self._names[key], f"model.config: {self._names[key]}"))

    def _number(self, name: str, where: str) -> float:
        value = self._values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise ConfigError(f"{where}={value}: expected a field of model.config that holds a positive number")
        return value


def with_config(section: Mapping[str, Any]) -> dict[str, Any]:
    """A model section in which the path of a config.json is replaced by what the file holds.

    So a sweep needs the file no more, and a run's identity has its content.
    """
    path = section.get("config")
    if section.get("kind") != KIND or not isinstance(path, str):
        return dict(section)
    try:
        config = parse_json(Path(path).expanduser().read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.config={path} cannot be read ({reason(error)}): name a config.json") from error
    if not isinstance(config, dict):
        raise ConfigError(f"model.config={path} holds a {type(config).__name__}: name a config.json")
    return {**section, "config": config}
