"""The data sets that nobody may pass on, or that ask for a registration: where they are, and how they must lie."""

from __future__ import annotations

from routeseg.data.sets import ade20k, cityscapes
from routeseg.data.sets.roots import expected

IMAGENET_TREE = """
ROOT/train/n01440764/NAME.JPEG      one folder for each class, of any name; also .jpg and .png
ROOT/val/n01440764/NAME.JPEG        the same classes
"""

BY_HAND = {
    "cityscapes": f"""\
cityscapes is not downloaded: it asks for a registration, and may not be passed on. What to do:
1. Register at https://www.cityscapes-dataset.com, with the address of your institution if it has one.
2. Download leftImg8bit_trainvaltest.zip (11 GB) and gtFine_trainvaltest.zip (241 MB); for the coarse labels also
   leftImg8bit_trainextra.zip (44 GB) and gtCoarse.zip (1.3 GB).
3. Unpack all of them into one folder; {expected(cityscapes.TREE)}
4. routeseg train --data.name cityscapes --data.root ROOT ...   (nothing has to be converted first)""",
    "ade20k": f"""\
ade20k is not downloaded: it is large, and its images come with terms that you should read first. What to do:
1. Read them at https://ade20k.csail.mit.edu.
2. Download the scene parsing release of 2016 (150 classes, 923 MB), not the full set with its parts:
   http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip
3. Unpack it; {expected(ade20k.TREE)}
4. routeseg train --data.name ade20k --data.root ROOT ...""",
    "imagenet": f"""\
imagenet is not downloaded: it asks for a registration, and may not be passed on. What to do:
1. Register at https://image-net.org, and ask for access to ILSVRC 2012.
2. Download ILSVRC2012_img_train.tar (138 GB) and ILSVRC2012_img_val.tar (6.3 GB); the first holds one .tar for each
   class, to be unpacked into a folder of its name; the images of the second have to be sorted into such folders.
3. Give the folder with both as ROOT; {expected(IMAGENET_TREE)}
4. routeseg pretrain --config imagenet/base --data.root ROOT --output runs/imagenet16""",
}
