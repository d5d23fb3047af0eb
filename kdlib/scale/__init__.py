"""Beyond one machine's memory: images that stay on the disk, views by seed, and recipes for a thousand classes."""

from kdlib.scale.stream import StreamedImages, load_images
from kdlib.scale.views import SeededViews, mixup_pair

__all__ = ["SeededViews", "StreamedImages", "load_images", "mixup_pair"]
