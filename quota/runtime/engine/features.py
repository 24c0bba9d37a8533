"""Encoded images, kept as long as there is memory for them."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping

from torch import Tensor

from quota.models.images import ImageInput
from quota.runtime.engine.model import EngineModel

log = logging.getLogger(__name__)


class Features:
    """Features by the digest of the image, the least recently used first out; the newest stays whatever its size."""

    def __init__(self, model: EngineModel, limit_bytes: int) -> None:
        self.model, self.limit_bytes, self.nbytes = model, limit_bytes, 0
        self._kept: OrderedDict[bytes, Tensor] = OrderedDict()

    def get(self, name: bytes) -> Tensor | None:
        """What is known of an image."""
        found = self._kept.get(name)
        if found is not None:
            self._kept.move_to_end(name)
        return found

    def encode(self, images: Mapping[bytes, ImageInput]) -> dict[bytes, Tensor | Exception]:
        """Encode all in one batch; after an exception each alone, so that only an image that cannot be encoded
        fails."""
        found: dict[bytes, Tensor | Exception] = {}
        try:
            found.update(zip(images, self.model.encode_images(list(images.values())), strict=True) if images else ())
        except Exception:
            log.exception("%d images could not be encoded together; encoding them one by one", len(images))
            for name, image in images.items():
                try:
                    found[name] = self.model.encode_images([image])[0]
                except Exception as error:
                    found[name] = error
        for name, features in found.items():
            if isinstance(features, Tensor):
                self._put(name, features)
        return found

    def _put(self, name: bytes, features: Tensor) -> None:
        self._kept[name] = features
        self.nbytes += features.nbytes
        while self.nbytes > self.limit_bytes and len(self._kept) > 1:
            _, old = self._kept.popitem(last=False)
            self.nbytes -= old.nbytes
