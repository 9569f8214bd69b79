"""LP-SAM: SAM with adapters for ultrasound, prompted by latent tokens in place of clicks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers.models.sam.configuration_sam import (
    SamConfig,
    SamMaskDecoderConfig,
    SamPromptEncoderConfig,
)
from transformers.models.sam.modeling_sam import SamMaskDecoder, SamPromptEncoder

from agssd_core.errors import ShapeError
from agssd_core.models.lpsam_encoder import STRIDE, ImageEncoder, LpsamShape, vision_config
from agssd_core.models.lpsam_engine import HEAD_WIDTH, LatentPromptEngine

Stage = Literal["adapters", "engine"]

# Of the paper's supplement, for ViT-B.
PAPER_PARAMETERS = {"adapters": 13_000_000, "engine": 11_100_000}
_ADAPTERS = ("stem", "position_down", "input_adapter", "adapters")


@dataclass(frozen=True)
class Prompts:
    """One click or box for each of P structures of B frames.

    Attributes:
        points: (B, P, 2) clicks, (x, y) in pixels of the padded input.
        boxes: (B, P, 4), (left, top, right, bottom).
        use_box: (B, P) bool.
    """

    points: Tensor
    boxes: Tensor
    use_box: Tensor

    def to(self, device: torch.device) -> "Prompts":
        """The same prompts on a device."""
        return Prompts(self.points.to(device), self.boxes.to(device), self.use_box.to(device))


class LpSam(nn.Module):
    """Image encoder, latent prompt engine, and SAM's prompt encoder and mask decoder."""

    def __init__(self, shape: LpsamShape) -> None:
        super().__init__()
        self.shape = shape
        self.encoder = ImageEncoder(shape)
        self.engine = LatentPromptEngine(
            shape.channels,
            stem=shape.stem,
            regions=shape.regions,
            tokens=shape.tokens,
            blocks=shape.blocks,
        )
        prompt = SamPromptEncoderConfig(
            hidden_size=shape.channels, image_size=shape.image_size, patch_size=STRIDE
        )
        decoder = SamMaskDecoderConfig(
            hidden_size=shape.channels,
            mlp_dim=shape.decoder_mlp,
            num_attention_heads=shape.channels // HEAD_WIDTH,
            iou_head_hidden_dim=shape.channels,
        )
        whole = SamConfig(
            vision_config=vision_config(shape),
            prompt_encoder_config=prompt,
            mask_decoder_config=decoder,
        )
        self.prompt_encoder = SamPromptEncoder(whole)
        # SamModel sets this too: its decoder is no pre-trained model of its own.
        decoder._attn_implementation = "sdpa"
        self.mask_decoder = SamMaskDecoder(decoder)
        # transformers draws random frequencies as wide as the encoder; SAM's own have scale 1.
        nn.init.normal_(self.prompt_encoder.shared_embedding.positional_embedding)

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) normalised to the embedding (B, C, G, G).

        Raises:
            ShapeError: the images have another size.
        """
        size = self.shape.image_size
        if images.shape[1:] != (3, size, size):
            raise ShapeError(
                f"images are {tuple(images.shape[1:])}, LP-SAM wants (3, {size}, {size}). Resize "
                "and pad them with prepare_frames first."
            )
        embedding: Tensor = self.encoder(images)
        return embedding

    def positions(self) -> Tensor:
        """Fourier positions of the token grid, (1, C, G, G)."""
        grid = self.shape.grid
        table = self.prompt_encoder.shared_embedding
        steps = (torch.arange(grid, device=table.positional_embedding.device) + 0.5) / grid
        rows, columns = torch.meshgrid(steps, steps, indexing="ij")
        encoded: Tensor = table(torch.stack([columns, rows], dim=-1))
        return encoded.permute(2, 0, 1)[None]

    def latent_prompts(self, images: Tensor, embedding: Tensor) -> Tensor:
        """The engine's (B, R, T, C)."""
        prompts: Tensor = self.engine(images, embedding, self.positions())
        return prompts

    def drawn_prompts(self, prompts: Prompts) -> Tensor:
        """Clicks and boxes as SAM's sparse embeddings, (B, P, 2, C)."""
        clicks = prompts.points[:, :, None]
        inside = torch.ones(clicks.shape[:3], device=clicks.device)
        at_points, _ = self.prompt_encoder(clicks, inside, None, None)
        at_boxes, _ = self.prompt_encoder(None, None, prompts.boxes, None)
        return torch.where(prompts.use_box[:, :, None, None], at_boxes, at_points)

    def decode(self, embedding: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
        """All prompts in one call.

        Args:
            embedding: (B, C, G, G).
            sparse: (B, P, T, C).

        Returns:
            Logits (B, P, 4G, 4G) and predicted IoU (B, P).
        """
        masks, iou = self.mask_decoder(
            image_embeddings=embedding,
            image_positional_embeddings=self.positions().expand(len(embedding), -1, -1, -1),
            sparse_prompt_embeddings=sparse,
            dense_prompt_embeddings=self.prompt_encoder.no_mask_embed.weight[:, :, None, None],
            multimask_output=False,
        )
        return masks[:, :, 0], iou[:, :, 0]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, R, 4G, 4G) and predicted IoU (B, R) of the latent prompts."""
        embedding = self.encode(images)
        return self.decode(embedding, self.latent_prompts(images, embedding))

    def stage_parameters(
        self, stage: Stage, *, pretrained: bool
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """What a stage trains, by name.

        Stage ``adapters`` trains what was added to SAM's encoder and the relative positions of
        its global blocks; without pre-trained weights all of SAM but the random frequencies of
        its positions. Stage ``engine`` trains engine and mask decoder.
        """
        for name, parameter in self.named_parameters():
            if self._belongs(name, stage, pretrained=pretrained):
                yield name, parameter

    def freeze_for(self, stage: Stage, *, pretrained: bool) -> list[nn.Parameter]:
        """Give gradients to a stage's parameters alone, and return them."""
        chosen = [item for _, item in self.stage_parameters(stage, pretrained=pretrained)]
        for parameter in self.parameters():
            parameter.requires_grad = False
        for parameter in chosen:
            parameter.requires_grad = True
        return chosen

    def _belongs(self, name: str, stage: Stage, *, pretrained: bool) -> bool:
        if name.startswith(("engine.", "mask_decoder.")) and stage == "engine":
            return True
        if stage == "engine" or name.startswith("engine."):
            return False
        if not pretrained:
            # SAM's dense prompts (mask_embed) are never used here.
            unused = ("prompt_encoder.shared_embedding", "prompt_encoder.mask_embed")
            return not name.startswith(unused)
        part, _, rest = name.removeprefix("encoder.").partition(".")
        if not name.startswith("encoder."):
            return False
        is_global = part == "layers" and int(rest.split(".")[0]) in self.shape.global_blocks
        return part in _ADAPTERS or (is_global and "rel_pos" in rest)


def parameter_counts(shape: LpsamShape, *, pretrained: bool) -> dict[str, int]:
    """Trainable parameters of both stages and all of the network, without allocating them."""
    with torch.device("meta"):
        network = LpSam(shape)
    counts = {
        stage: sum(
            item.numel() for _, item in network.stage_parameters(stage, pretrained=pretrained)
        )
        for stage in ("adapters", "engine")
    }
    return {**counts, "all": sum(item.numel() for item in network.parameters())}
