"""Names and shapes of torchvision's ResNets, written down from the architecture.

He et al. 2016, arXiv:1512.03385, Table 1, with torchvision's module names, its 1000 classes and
the stride in the bottleneck's 3x3 convolution. torchvision itself is no dependency.
"""

BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
# As torchvision publishes them with its weights.
PARAMETERS = {18: 11_689_512, 34: 21_797_672, 50: 25_557_032, 101: 44_549_160, 152: 60_192_808}
TENSORS = {18: 122, 34: 218, 50: 320, 101: 626, 152: 932}
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def state_shapes(depth, *, classes=1000, statistics=True):
    """Name -> shape of ``torchvision.models.resnetDEPTH().state_dict()``."""
    found = {}

    def norm(name, planes):
        for part in ("weight", "bias", *(BUFFERS if statistics else ())):
            found[f"{name}.{part}"] = () if part == "num_batches_tracked" else (planes,)

    expansion, kernels = (4, (1, 3, 1)) if depth >= 50 else (1, (3, 3))
    found["conv1.weight"] = (64, 3, 7, 7)
    norm("bn1", 64)
    before = 64
    for stage, count in enumerate(BLOCKS[depth]):
        planes = 64 * 2**stage
        after = planes * expansion
        for block in range(count):
            name = f"layer{stage + 1}.{block}"
            widths = [before, *[planes] * (len(kernels) - 1), after]
            for number, kernel in enumerate(kernels):
                shape = (widths[number + 1], widths[number], kernel, kernel)
                found[f"{name}.conv{number + 1}.weight"] = shape
                norm(f"{name}.bn{number + 1}", widths[number + 1])
            if block == 0 and (stage > 0 or before != after):
                found[f"{name}.downsample.0.weight"] = (after, before, 1, 1)
                norm(f"{name}.downsample.1", after)
            before = after
    found["fc.weight"], found["fc.bias"] = (classes, before), (classes,)
    return found
