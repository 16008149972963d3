"""The table of what is measured: one Cell for each operation, direction, layout and shape."""

from dataclasses import dataclass
from math import prod

RESNET = (
    (64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7),
    (2048, 7),
)
DIFFUSION = ((2, 320, 64), (2, 640, 32), (2, 1280, 16), (2, 1280, 8), (1, 128, 512), (1, 512, 64))
ROWS = (
    (4096, 768), (16384, 768), (8192, 1024), (2048, 4096), (1024, 8192), (65536, 96), (64, 768),
    (16, 4096),
)
CONVNEXT = ((96, 56), (192, 28), (384, 14), (768, 7))  # layer norm over the channels
VOLUMES = ((2, 32, 64, 64, 64), (2, 320, 8, 8, 8))
ODD = ((32, 3, 224, 224), (32, 192, 35, 35), (16, 17, 56, 56), (16, 100, 13, 13), (1, 96, 9, 11))
TINY = (1, 64, 8, 8)
QUICK = {(32, 64, 56, 56), (32, 512, 7, 7), (2, 320, 64, 64), (4096, 768), (16, 17, 56, 56), TINY}


@dataclass(frozen=True)
class Cell:
    """One operation on one shape, (N, C, *spatial) or (rows, columns).

    op is batch, batch_eval, group, instance, layer or rms; layout is "" for rows, and "NCHW" for a
    layer norm over the channels of every place. after is what
    is computed in the same call: an activation, a residual (of rows: added first), or both.
    """

    op: str
    backward: bool
    layout: str
    shape: tuple
    groups: int = 0
    after: tuple = ()

    def __str__(self):
        return f"{self.family} {'x'.join(map(str, self.shape))}"

    @property
    def family(self):
        """What figures are averaged over."""
        op = "+".join((self.op, *self.after))
        return " ".join(filter(None, (op, "backward" * self.backward, self.layout)))

    @property
    def tiny(self):
        return prod(self.shape) < 1 << 15

    def bytes(self, itemsize):
        """Of x."""
        return prod(self.shape) * itemsize


def cells(quick=False):
    """Every cell, or with quick a few of each family."""
    table = []

    def add(ops, layouts, shapes, groups=0, after=()):
        for op in ops:
            for back in (False, True)[: 1 + (op != "batch_eval" and "residual" not in after)]:
                table.extend(
                    Cell(op, back, layout, shape, groups, after)
                    for layout in layouts for shape in shapes
                )

    images = ("NCHW", "NHWC")
    batches = ("batch", "batch_eval")
    add(batches, images, [(32, c, s, s) for c, s in RESNET])
    add(batches, images, [(n, c, s, s) for n in (1, 8) for c, s in ((64, 56), (512, 7))])
    add(batches, images, [*ODD, TINY])
    add(("batch",), ("",), [(128, 1024), (4096, 256), (256, 4096), (64, 8192)])
    add(("group",), images, [(n, c, s, s) for n, c, s in DIFFUSION], 32)
    add(("group",), images, [TINY, (2, 96, 17, 19)], 32)
    add(("instance",), images, [*VOLUMES, (2, 320, 64, 64), (8, 17, 56, 56)])
    add(("layer", "rms"), ("",), [*ROWS, (3000, 1000), (20000, 300), (64, 64)])
    add(("layer",), ("NCHW",), [(32, c, s, s) for c, s in CONVNEXT])
    blocks = [(32, c, s, s) for c, s in ((64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7))]
    add(batches, images, [*blocks, (1, 256, 56, 56)], after=("residual", "relu"))
    add(("batch",), images, [(32, 64, 56, 56), (32, 256, 14, 14)], after=("relu",))
    add(("group",), images, [(n, c, s, s) for n, c, s in DIFFUSION], 32, after=("silu",))
    add(("layer", "rms"), ("",), ROWS, after=("residual",))
    return [c for c in table if c.shape in QUICK] if quick else table
