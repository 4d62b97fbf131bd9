"""ImageNet: the rows of the paper's Table II with torchvision's ResNet-18 and ResNet-50. Runnable, not run.

    python benchmarks/imagenet.py --data IMAGENET --arch resnet18 --recipe plain,joint_ce,main_kl,eed_kl --amp bf16
    python benchmarks/imagenet.py --estimate 2500      # what it takes at so many images a second

IMAGENET holds `train` and `val`, each with a folder of images for each class. The paper does not give its ImageNet
recipe; this is the usual one (MSDNet and IMTA code): SGD, batch 256, 90 epochs, 0.1 divided by 10 every 30, weight
decay 1e-4, random resized crops and mirrors, and a centre crop of 224 from 256 to judge. So its figures are to be
compared with one another, not with the paper's. Rows go to `results/imagenet.csv`, with the columns of
`cifar100.csv`. Every run is on its own: several machines take a row each.
"""

import sys
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent))

from fastai.vision.all import *
from fastcore.script import *

from cifar100 import all_recipes, check_choices, here, split_commas, train_row
from eed_fastai.all import *

archs = {'resnet18': resnet18, 'resnet50': resnet50}
n_images = 1_281_167
n_epochs = 90

def get_dls(data, bs, size, workers):
    "Loaders of ImageNet's two folders"
    path = Path(data)
    if not (path/'train').is_dir() or not (path/'val').is_dir():
        expected = 'expected ImageNet as class folders below both'
        raise CliError(f'{data} holds no folders `train` and `val`; {expected}')
    block = DataBlock(
        (ImageBlock, CategoryBlock),
        get_items=partial(get_image_files, folders=['train', 'val']),
        get_y=parent_label,
        splitter=GrandparentSplitter('train', 'val'),
        item_tfms=RandomResizedCrop(size, min_scale=0.08),
        batch_tfms=[Flip(), Normalize.from_stats(*imagenet_stats)],
    )
    return block.dataloaders(path, bs=bs, num_workers=workers)

def macs_without_and_with_exits(arch):
    "Multiply-adds for an image of 224 pixels: the plain network's, and with all its exits"
    costs = exit_costs(multi_exit(arch, n_out=1000), 224, ensemble=True).set_index('exit').macs
    return costs.main, costs.ensemble

def estimate_hours(rate):
    "Hours for each row of Table II, if the plain ResNet-18 trains `rate` images a second, by the multiply-adds"
    macs = {name: macs_without_and_with_exits(arch) for name, arch in archs.items()}
    hours_of_resnet18 = n_images*n_epochs/rate/3600
    rows = []
    for name, (plain, with_exits) in macs.items():
        hours = hours_of_resnet18*plain/macs['resnet18'][0]
        more = with_exits/plain
        rows.append(dict(
            arch=name,
            gmac_plain=plain/1e9,
            gmac_all_exits=with_exits/1e9,
            plain=f'{hours:.1f} h',
            with_exits=f'{hours*more:.1f} h',
            table_on_one=f'{hours*3*more/24:.1f} days',
            table_on_three=f'{hours*more/24:.1f} days',
        ))
    print(f'{n_images:,} images, {n_epochs} epochs; resnet18 without exits at {rate:,.0f} images a second, '
          'the others by their multiply-adds; Table II has three methods for each network')
    print(pd.DataFrame(rows).round(2).to_string(index=False))

@call_parse
def main(
    data:str=None, # Folder with train and val
    arch:str='resnet18', # resnet18, resnet50, or both with a comma
    recipe:str='joint_ce,main_kl,eed_kl', # Recipes, with commas (Table II has these three)
    seeds:str='0', # Seeds, with commas
    epochs:int=n_epochs, # Epochs (90: MSDNet and IMTA code)
    lr:float=0.1, # Learning rate before the steps (0.1: the same)
    wd:float=1e-4, # Weight decay (1e-4: the same)
    bs:int=256, # Images in a batch (256: the same)
    size:int=224, # Side of the images in pixels
    workers:int=None, # Processes that load images (fastai's default)
    amp:str=None, # Mixed precision: bf16 or fp16, on a GPU
    channels_last:bool=False, # Channels-last memory format
    compile:bool=False, # torch.compile
    results:str=str(here/'results'), # Folder of the rows
    estimate:float=None, # Print what it takes at so many images a second, and train nothing
):
    "Train rows of Table II on ImageNet"
    if estimate:
        return estimate_hours(estimate)
    if data is None:
        raise CliError('Give --data, the folder with ImageNet, or --estimate')
    check_choices(archs, split_commas(arch), 'network')
    check_choices(all_recipes, split_commas(recipe), 'recipe')
    settings = dict(data=data, dataset='imagenet', width=None, protocol='report', schedule='imagenet', epochs=epochs)
    settings |= dict(lr=lr, wd=wd, bs=bs, size=size, nesterov=False, amp=amp, channels_last=channels_last)
    settings |= dict(compile=compile, results=Path(results), every=1, judge_every=1)
    for net, seed, rec in itertools.product(split_commas(arch), map(int, split_commas(seeds)), split_commas(recipe)):
        o = SimpleNamespace(**settings, network=net, seed=seed, recipe=rec)
        train_row(o, 'imagenet', partial(get_dls, data, bs, size, workers), archs[net])
