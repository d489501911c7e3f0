"""Where each data set comes from and what its licence asks, said whenever something is missing. No downloads."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """A data set's name, its home, the archives to unpack, and what the licence asks."""

    name: str
    home: str
    archives: str
    licence: str

    def sentence(self) -> str:
        """One sentence for a message."""
        return f"{self.name} comes from {self.home}, as {self.archives}; {self.licence}."


ORIGINS = {
    "coco": Origin(
        "COCO",
        "cocodataset.org/#download",
        "train2017.zip, val2017.zip, annotations_trainval2017.zip",
        "annotations are CC BY 4.0, images stay under Flickr's terms of use",
    ),
    "voc": Origin(
        "Pascal VOC",
        "host.robots.ox.ac.uk/pascal/VOC",
        "VOCtrainval_06-Nov-2007.tar, VOCtest_06-Nov-2007.tar, VOCtrainval_11-May-2012.tar",
        "images stay under Flickr's terms of use, and VOC asks to be cited",
    ),
    "sbd": Origin(
        "SBD",
        "the page of the Semantic Boundaries Dataset (B. Hariharan et al., ICCV 2011)",
        "benchmark.tgz with benchmark_RELEASE/dataset/cls/*.mat",
        "its images are VOC's, and it asks to be cited",
    ),
    "cityscapes": Origin(
        "Cityscapes",
        "www.cityscapes-dataset.com/downloads after registration",
        "leftImg8bit_trainvaltest.zip, gtFine_trainvaltest.zip",
        "it is for non-commercial research and teaching, may not be passed on, and asks to be cited",
    ),
    "imagenet": Origin(
        "ImageNet",
        "image-net.org after registration",
        "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar",
        "it is for non-commercial research and education and may not be passed on",
    ),
    "imagenet-subsets": Origin(
        "SimCLR's split of ImageNet",
        "github.com/google-research/simclr, folder imagenet_subsets",
        "1percent.txt, 10percent.txt",
        "the lists are Apache-2.0",
    ),
}
