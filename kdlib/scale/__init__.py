"""Beyond one machine: soft labels for a thousand classes."""

from kdlib.scale.compact import CompactSoftLabels, bytes_per_view, compress
from kdlib.scale.compact_errors import compact_errors, made_up_logits
from kdlib.scale.compact_files import generate_compact, load_compact

__all__ = [
    "CompactSoftLabels",
    "bytes_per_view",
    "compact_errors",
    "compress",
    "generate_compact",
    "load_compact",
    "made_up_logits",
]
