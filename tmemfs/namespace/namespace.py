"""Assemble the parts of one guest for names and attributes. Tests use them without a mount."""

from __future__ import annotations

from tmemfs.datapath import DataPath
from tmemfs.namespace.attributes import Attributes
from tmemfs.namespace.listing import Listings
from tmemfs.namespace.opener import Opener
from tmemfs.namespace.revalidate import Revalidator
from tmemfs.namespace.tree import Tree


class Namespace:
    """Names, attributes, opens and listings over a data path. `synchronous`: every file is opened with O_SYNC."""

    def __init__(self, data: DataPath, *, synchronous: bool = False) -> None:
        self.tree = Tree(data.backing, data.inodes)
        self.revalidator = Revalidator(data.backing, data.inodes)
        self.attributes = Attributes(data.backing, data.inodes, data.writer)
        self.opener = Opener(data, self.attributes, self.tree, self.revalidator, synchronous=synchronous)
        self.listings = Listings(data.backing, data.inodes)
