"""A scalar head over the body of a causal model, for families that have no sequence classifier in transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

WEIGHTS = "model.safetensors"


class ScalarHead(PreTrainedModel):
    """`model`, the body, and `score`, a linear layer to one number without bias; used as transformers' classifiers are."""

    base_model_prefix = "model"
    config_class = PretrainedConfig
    # which kernels there are is decided by the body's own class, whose choice is in the config by then
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _can_set_experts_implementation_cached_value = True

    def __init__(self, config: PretrainedConfig, body: PreTrainedModel | None = None) -> None:
        """Over a new body of that config, or over one that is there; the head is all zeros."""
        if body is None:
            body = AutoModelForCausalLM.from_config(config, dtype=torch.float32).base_model
        super().__init__(config)
        self.model = body
        self.score = nn.Linear(config.get_text_config().hidden_size, 1, bias=False, device=next(body.parameters()).device)
        nn.init.zeros_(self.score.weight)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def save(self, folder: Path) -> None:
        """Config and weights, each as it is in memory."""
        folder.mkdir(parents=True, exist_ok=True)
        self.config.architectures, self.config.dtype = [type(self).__name__], torch.float32
        self.config.save_pretrained(folder)
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in self.state_dict().items()},
                  folder / WEIGHTS, metadata={"format": "pt"})

    @classmethod
    def load(cls, folder: Path, config: PretrainedConfig) -> ScalarHead:
        """The inverse of `save`, in float32."""
        model = cls(config)
        model.load_state_dict(load_file(folder / WEIGHTS))
        return model
