"""Small random models of other libraries, and what attach has to find in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

OPERATORS: list[torch.library.Library] = []  # an operator lives as long as its Library


def library(name: str) -> Any:
    """Import a library. Skip the test where it is not installed."""
    try:
        import torchvision  # noqa: F401  # the others import it too
    except ModuleNotFoundError:
        pass
    except RuntimeError:
        # The wheel on the package index has operators for CUDA, which do not load beside a torch without it. Then
        # torchvision cannot be imported, because it names two of them: declare these. No model here calls one.
        OPERATORS.append(torch.library.Library("torchvision", "DEF"))
        for operator in ("nms", "qnms"):
            OPERATORS[-1].define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip(name)


class Case(NamedTuple):
    """A model and its activations."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any]  # of so many rows: a tensor, or a mapping of arguments
    activations: str  # the names of their classes
    count: int  # of their calls
    last: str | None = None  # a pattern of the names of those whose channels are the last dimension
    warning: str | None = None  # of activations that are out of reach
    dtype: torch.dtype = torch.float32


ALL = ""  # the pattern that every name has

TEXT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VISION = {**TEXT, "image_size": 16, "patch_size": 8}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
DIFFUSION = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "in_channels": 3,
    "out_channels": 3,
}


def images(size: int, channels: int = 3) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, channels, size, size)


def pixels(size: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda rows: {"pixel_values": images(size)(rows)}


def tokens(*names: str) -> Callable[[int], dict[str, Tensor]]:
    return lambda rows: {name: torch.randint(1, 40, (rows, 7)) for name in names}


def transformers(model: str, config: str, **settings: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = library("transformers")
        return getattr(module, model)(getattr(module, config)(**settings))

    return make


def timm(model: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: library("timm").create_model(model, num_classes=5, **settings)


def diffusers(model: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(library("diffusers"), model)(**DIFFUSION, **settings)


def monai(model: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(library("monai.networks.nets"), model)(spatial_dims=2, **settings)


def vision(model: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(library("torchvision.models"), model)(num_classes=5, **settings)


CASES = {
    "BERT": Case(
        transformers("BertForSequenceClassification", "BertConfig", vocab_size=40, **TEXT),
        tokens("input_ids"),
        "GELUActivation Tanh",
        3,
        last="intermediate",
    ),
    "DistilBERT": Case(
        transformers(
            "DistilBertForSequenceClassification",
            "DistilBertConfig",
            vocab_size=40,
            dim=16,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
        ),
        tokens("input_ids"),
        "GELUActivation",
        2,
        last=ALL,
        warning="not in the model: ReLU",  # made anew in each forward
    ),
    "GPT-2": Case(
        transformers(
            "GPT2LMHeadModel",
            "GPT2Config",
            vocab_size=40,
            n_embd=16,
            n_layer=2,
            n_head=2,
            bos_token_id=0,
            eos_token_id=0,
        ),
        tokens("input_ids"),
        "NewGELUActivation",
        2,
        last=ALL,
    ),
    "Llama": Case(
        transformers("LlamaForCausalLM", "LlamaConfig", vocab_size=40, **TEXT),
        tokens("input_ids"),
        "SiLUActivation",
        2,
        last=ALL,
    ),
    "T5 with ReLU": Case(
        transformers("T5ForConditionalGeneration", "T5Config", vocab_size=40, **T5),
        tokens("input_ids", "decoder_input_ids"),
        "ReLU",
        4,
        last=ALL,
    ),
    "T5 with a gated GELU": Case(
        transformers("T5ForConditionalGeneration", "T5Config", vocab_size=40, feed_forward_proj="gated-gelu", **T5),
        tokens("input_ids", "decoder_input_ids"),
        "NewGELUActivation",
        4,
        last=ALL,
    ),
    "ViT of transformers": Case(
        transformers("ViTForImageClassification", "ViTConfig", **VISION), pixels(16), "GELUActivation", 2, last=ALL
    ),
    "ConvNeXt of transformers": Case(
        transformers(
            "ConvNextForImageClassification", "ConvNextConfig", hidden_sizes=[8, 12], depths=[2, 2], num_stages=2
        ),
        pixels(32),
        "GELUActivation",
        4,
        last=ALL,
    ),
    "CLIP": Case(
        transformers(
            "CLIPModel",
            "CLIPConfig",
            text_config={**TEXT, "vocab_size": 40, "bos_token_id": 0, "eos_token_id": 2},
            vision_config=VISION,
            projection_dim=8,
        ),
        lambda rows: tokens("input_ids")(rows) | pixels(16)(rows),
        "QuickGELUActivation",
        4,
        last=ALL,
    ),
    "Swin": Case(
        transformers(
            "SwinForImageClassification",
            "SwinConfig",
            image_size=32,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[1, 2],
            window_size=4,
        ),
        pixels(32),
        "GELUActivation",
        2,
        last=ALL,
    ),
    "convnext_atto": Case(timm("convnext_atto"), images(32), "GELU", 12),
    # In float32 plain PyTorch's own gradients err by 1e-5 of the largest: batch norms see few values of a channel.
    "efficientnet_b0": Case(timm("efficientnet_b0"), images(32), "SiLU Sigmoid", 65, dtype=torch.float64),
    "vit_tiny": Case(timm("vit_tiny_patch16_224", img_size=32), images(32), "GELU", 12, last=ALL),
    "mobilenetv3_small": Case(timm("mobilenetv3_small_050"), images(32), "Hardswish ReLU Hardsigmoid", 42),
    "UNet2DConditionModel": Case(
        diffusers(
            "UNet2DConditionModel",
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=8,
        ),
        lambda rows: {
            "sample": images(8)(rows),
            "timestep": torch.arange(rows),
            "encoder_hidden_states": torch.randn(rows, 4, 8),
        },
        "SiLU",
        26,
        warning="are functions.*F.gelu",  # in the gated feed-forward layers
    ),
    "UNet2DModel": Case(
        diffusers(
            "UNet2DModel",
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        ),
        lambda rows: {"sample": images(8)(rows), "timestep": torch.arange(rows)},
        "SiLU",
        26,
    ),
    "UNet of monai": Case(
        monai(
            "UNet", in_channels=1, out_channels=2, channels=(4, 8, 16), strides=(2, 2), num_res_units=1, norm="batch"
        ),
        images(16, 1),
        "PReLU",
        6,
    ),
    "UNETR": Case(
        monai(
            "UNETR",
            in_channels=1,
            out_channels=2,
            img_size=32,
            feature_size=4,
            hidden_size=16,
            mlp_dim=24,
            num_heads=2,
        ),
        images(32, 1),
        "GELU LeakyReLU",
        28,
        last="^vit",
    ),
    "Unet of segmentation_models_pytorch": Case(
        lambda: library("segmentation_models_pytorch").Unet("resnet18", encoder_weights=None), images(32), "ReLU", 27
    ),
    "resnet18": Case(vision("resnet18"), images(32), "ReLU", 17),
    "mobilenet_v3_small": Case(vision("mobilenet_v3_small"), images(32), "Hardswish ReLU Hardsigmoid", 42),
    "ViT of torchvision": Case(
        vision(
            "VisionTransformer",
            image_size=16,
            patch_size=8,
            num_layers=2,
            num_heads=2,
            hidden_dim=16,
            mlp_dim=24,
        ),
        images(16),
        "GELU",
        2,
        last=ALL,
    ),
}


class Normed(NamedTuple):
    """A model with batch norms."""

    make: Callable[[], nn.Module]
    inputs: Callable[[int], Any]
    count: int  # of batch norms
    folded: int  # with an example
    traced: int  # of these without one


STAGES = {"num_channels": 3, "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 1]}
MONAI = {"in_channels": 3, "norm": "batch"}

NORMED = {
    "ResNet of transformers": Normed(
        transformers("ResNetForImageClassification", "ResNetConfig", **STAGES), pixels(32), 11, 11, 0
    ),
    "RegNet of transformers": Normed(
        transformers("RegNetForImageClassification", "RegNetConfig", groups_width=4, **STAGES), pixels(32), 12, 12, 0
    ),
    "MobileNetV2 of transformers": Normed(
        transformers("MobileNetV2ForImageClassification", "MobileNetV2Config", depth_multiplier=0.35, min_depth=4),
        pixels(32),
        52,
        52,
        0,
    ),
    "ResNet of timm": Normed(timm("resnet10t"), images(32), 14, 14, 14),
    "LCNet of timm, activations inside": Normed(timm("lcnet_050"), images(32), 27, 27, 27),
    "MobileNetV3 of timm, paddings of its own": Normed(
        timm("tf_mobilenetv3_small_minimal_100"), images(32), 34, 29, 29
    ),
    "LeViT of timm, linear layers on (N, L, C)": Normed(timm("levit_128s"), images(224), 52, 4, 4),
    "DenseNet of torchvision, norms first": Normed(vision("densenet121"), images(32), 121, 59, 0),
    "UNet of monai": Normed(
        monai("UNet", out_channels=2, channels=(4, 8), strides=(2,), num_res_units=1, **MONAI), images(16), 3, 3, 3
    ),
    "SegResNet of monai, norms first": Normed(monai("SegResNet", out_channels=2, **MONAI), images(16), 25, 12, 12),
}
