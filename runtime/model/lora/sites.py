"""How large an adapter's matrices are at each linear, and which part of them a rank holds."""

from dataclasses import dataclass
from typing import cast

from mizzen.runtime.model.block import Block
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.lora.adapter import Pair
from mizzen.runtime.parallel.shard import Span


@dataclass(frozen=True, slots=True)
class SiteShape:
    """A linear's whole size, and the part of it that this rank holds."""

    width_in: int
    width_out: int
    rows: Span | None  # column-parallel: this rank has these outputs, so B is cut
    columns: Span | None  # row-parallel: this rank reads these inputs, so A is cut

    def cut(self, pair: Pair) -> Pair:
        """Return this rank's part of an adapter's matrices."""
        a_RI, b_OR = pair
        if self.columns is not None:
            a_RI = a_RI[:, self.columns.start : self.columns.stop]
        if self.rows is not None:
            b_OR = b_OR[self.rows.start : self.rows.stop]
        return Pair(a_RI, b_OR)


def site_shapes(decoder: Decoder) -> dict[str, SiteShape]:
    """Return each target's shape; all layers of a model are alike."""
    spec, block = decoder.spec, cast(Block, decoder.blocks[0])
    q, k, v = (part.span for part in block.attention.qkv.parts)
    wide, ff = spec.hidden_size, spec.intermediate_size
    q_width, kv_width = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    hidden = block.feed_forward.down.part.span
    sites = {
        "q_proj": SiteShape(wide, q_width, q, None),
        "k_proj": SiteShape(wide, kv_width, k, None),
        "v_proj": SiteShape(wide, kv_width, v, None),
        "o_proj": SiteShape(q_width, wide, None, q),
        "up_proj": SiteShape(wide, ff, hidden, None),
        "down_proj": SiteShape(ff, wide, None, hidden),
    }
    if spec.is_gated:
        sites["gate_proj"] = SiteShape(wide, ff, hidden, None)
    return sites
