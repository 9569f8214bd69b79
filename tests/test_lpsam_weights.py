import pytest
import torch
from safetensors.torch import save_file
from transformers.models.sam.configuration_sam import (
    SamConfig,
    SamMaskDecoderConfig,
    SamPromptEncoderConfig,
    SamVisionConfig,
)
from transformers.models.sam.modeling_sam import SamModel

from agssd_core.errors import WeightsError
from agssd_core.models.lpsam import LpSam, LpsamShape, Prompts, parameter_counts
from agssd_core.models.sam_weights import load_sam
from agssd_core.weights import file_digest

TINY = LpsamShape(
    image_size=64,
    width=64,
    depth=2,
    heads=2,
    window=3,
    global_blocks=(1,),
    channels=64,
    decoder_mlp=32,
    stem=4,
    regions=3,
    blocks=2,
)


def tiny_sam(shape: LpsamShape = TINY) -> SamModel:
    """SAM with its own stride of 16 on the same token grid doubled, random weights."""
    torch.manual_seed(5)
    model = SamModel(
        SamConfig(
            vision_config=SamVisionConfig(
                hidden_size=shape.width,
                output_channels=shape.channels,
                num_hidden_layers=shape.depth,
                num_attention_heads=shape.heads,
                image_size=32 * shape.grid,
                patch_size=16,
                window_size=shape.window,
                global_attn_indexes=list(shape.global_blocks),
                num_pos_feats=shape.channels // 2,
                mlp_dim=4 * shape.width,
            ),
            prompt_encoder_config=SamPromptEncoderConfig(
                hidden_size=shape.channels, image_size=32 * shape.grid, patch_size=16
            ),
            mask_decoder_config=SamMaskDecoderConfig(
                hidden_size=shape.channels,
                mlp_dim=shape.decoder_mlp,
                num_attention_heads=shape.channels // 32,
                iou_head_hidden_dim=shape.channels,
            ),
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model


def original_names(model: SamModel) -> dict[str, torch.Tensor]:
    """The same arrays as the original release names them (segment_anything, build_sam.py)."""
    named = {}
    for name, tensor in model.state_dict().items():
        if name == "prompt_encoder.shared_embedding.positional_embedding":
            continue
        if name == "shared_image_embedding.positional_embedding":
            name = "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
        pairs = [
            ("vision_encoder.layers.", "image_encoder.blocks."),
            ("vision_encoder.", "image_encoder."),
            ("patch_embed.projection", "patch_embed.proj"),
            ("neck.conv1", "neck.0"),
            ("neck.layer_norm1", "neck.1"),
            ("neck.conv2", "neck.2"),
            ("neck.layer_norm2", "neck.3"),
            ("point_embed.", "point_embeddings."),
            ("mask_embed.conv1", "mask_downscaling.0"),
            ("mask_embed.layer_norm1", "mask_downscaling.1"),
            ("mask_embed.conv2", "mask_downscaling.3"),
            ("mask_embed.layer_norm2", "mask_downscaling.4"),
            ("mask_embed.conv3", "mask_downscaling.6"),
            ("upscale_conv1", "output_upscaling.0"),
            ("upscale_layer_norm", "output_upscaling.1"),
            ("upscale_conv2", "output_upscaling.3"),
            ("layer_norm", "norm"),
        ]
        head = "mlps." in name or "iou_prediction_head" in name
        if head:
            pairs += [("layers.0", "layers.1"), ("proj_in", "layers.0"), ("proj_out", "layers.2")]
        for ours, theirs in pairs:
            if name.startswith("prompt_encoder.not_a_point_embed"):
                break
            name = name.replace(ours, theirs)
        named[name] = tensor.clone()
    return named


def loaded(source, **kwargs) -> LpSam:
    torch.manual_seed(0)
    network = LpSam(TINY)
    load_sam(network, str(source), **kwargs)
    return network


def test_a_saved_sam_model_answers_clicks_as_transformers_does(tmp_path):
    sam = tiny_sam()
    sam.save_pretrained(tmp_path)
    network = loaded(tmp_path)
    embedding = torch.randn(2, 64, 8, 8, generator=torch.Generator().manual_seed(1))
    points = torch.tensor([[[10.0, 20.0], [40.0, 8.0]], [[3.0, 3.0], [60.0, 33.0]]])
    boxes = torch.tensor([[[4.0, 6.0, 30.0, 50.0]] * 2] * 2)
    sam.prompt_encoder.input_image_size = 64
    sam.prompt_encoder.image_embedding_size = (8, 8)
    sam.config.prompt_encoder_config.image_embedding_size = 8
    for use_box in (False, True):
        chosen = torch.full((2, 2), use_box)
        given = {"input_boxes": boxes} if use_box else {"input_points": points[:, :, None]}
        theirs = sam(image_embeddings=embedding, multimask_output=False, **given)
        sparse = network.drawn_prompts(Prompts(points, boxes, chosen))
        masks, iou = network.decode(embedding, sparse)
        torch.testing.assert_close(masks, theirs.pred_masks[:, :, 0])
        torch.testing.assert_close(iou, theirs.iou_scores[:, :, 0])


def test_fresh_adapters_leave_sams_blocks_as_they_are(tmp_path):
    sam = tiny_sam()
    sam.save_pretrained(tmp_path)
    network = loaded(tmp_path)
    tokens = torch.randn(2, 8, 8, 64)
    layer = network.encoder.layers[1]
    adapted, _ = network.encoder.adapters["1"](layer, tokens, torch.randn(2, 64, 8, 8))
    torch.testing.assert_close(adapted, layer(tokens))


def test_positions_are_those_of_sam(tmp_path):
    sam = tiny_sam()
    sam.save_pretrained(tmp_path)
    sam.config.prompt_encoder_config.image_embedding_size = 8
    torch.testing.assert_close(
        loaded(tmp_path).positions(), sam.get_image_wide_positional_embeddings()
    )


@pytest.mark.parametrize("wrapped", [False, True])
def test_the_original_pth_gives_the_same_arrays(tmp_path, wrapped):
    sam = tiny_sam()
    sam.save_pretrained(tmp_path)
    named = original_names(sam)
    assert "prompt_encoder.mask_downscaling.6.weight" in named
    torch.save({"model": named} if wrapped else named, tmp_path / "sam_vit_b.pth")
    one, other = loaded(tmp_path).state_dict(), loaded(tmp_path / "sam_vit_b.pth").state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_pth_that_would_run_code_is_refused(tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"a": Evil()}, tmp_path / "sam.pth")
    with pytest.raises(WeightsError, match="Download it again, as safetensors"):
        loaded(tmp_path / "sam.pth")
    assert "ran" not in capsys.readouterr().out


def test_another_network_and_a_wrong_digest_are_refused(tmp_path):
    sam = tiny_sam()
    tensors = {name: item.clone() for name, item in sam.state_dict().items()}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file)
    assert load_sam(LpSam(TINY), str(file), digest=file_digest(file)) == file_digest(file)
    with pytest.raises(WeightsError, match="Use the file that was meant"):
        loaded(file, digest="0" * 64)
    save_file({**tensors, "extra.weight": torch.zeros(1)}, file)
    with pytest.raises(WeightsError, match=r"1 are unknown \(extra.weight\)"):
        loaded(file)
    tensors.pop("mask_decoder.iou_token.weight")
    save_file(tensors, file)
    with pytest.raises(WeightsError, match="1 array"):
        loaded(file)
    tensors["mask_decoder.iou_token.weight"] = torch.zeros(1, 32)
    save_file(tensors, file)
    with pytest.raises(WeightsError, match="Use SAM ViT-B weights"):
        loaded(file)
    file.write_bytes(b"damaged")
    with pytest.raises(WeightsError, match="Download it again"):
        loaded(file)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="no tensors by name"):
        loaded(tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="names no file"):
        loaded(tmp_path / "absent.pth")


def test_parameters_of_vit_b_stand_beside_the_papers():
    counts = parameter_counts(LpsamShape(), pretrained=True)
    # The paper says 13 M and 11.1 M; its 13 M are the adapters without the 3x3 convolutions that
    # refine the CNN branch and shrink the positions (21.24 M and 5.31 M).
    assert counts["adapters"] - 21_236_736 - 5_310_720 == pytest.approx(13.1e6, rel=0.01)
    # The released engine also computes an image update in its last block, 0.33 M, and drops it.
    assert counts["engine"] + 329_472 == pytest.approx(11.07e6, rel=0.002)
    assert parameter_counts(LpsamShape(), pretrained=False)["adapters"] > 120e6


def test_vit_b_gives_eight_masks_of_half_the_inputs_edge():
    with torch.device("meta"):  # shapes without the arithmetic
        logits, iou = LpSam(LpsamShape())(torch.zeros(2, 3, 256, 256))
    assert logits.shape == (2, 8, 128, 128)
    assert iou.shape == (2, 8)
