"Small real data and a small real network, shared by all tests."

import warnings
import matplotlib

matplotlib.use('Agg')
import pytest
from fastai.vision.all import *
from eed_fastai.all import *

torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 2)))
tiny_resnet = partial(cifar_resnet18, width=8)
all_digits = digits_dls(aug=False)


def small_digits(n=96, bs=16, **kw):
    "The first digits of the training set, a third of them for validation"
    items = all_digits.train_ds.items[:n]
    block = DataBlock(
        (ImageBlock, CategoryBlock(vocab=list(all_digits.vocab))),
        get_x=ItemGetter(0),
        get_y=ItemGetter(1),
        splitter=IndexSplitter(range(n - n // 3, n)),
        batch_tfms=Normalize.from_stats(*imagenet_stats),
    )
    return block.dataloaders(items, bs=bs, num_workers=0, **kw)


def make_learner(cbs=None, dls=None, model=None, metrics=accuracy, **kw):
    return Learner(
        small_digits() if dls is None else dls, ifnone(model, multi_exit(tiny_resnet)), cbs=cbs, metrics=metrics, **kw
    )


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    "Each test starts from the same seed, in a folder of its own, without progress bars or warnings of other libraries"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(defaults, 'callbacks', [c for c in defaults.callbacks if c is not ProgressCallback])
    set_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield
    plt.close('all')


for name in [o for o in globals() if o.startswith('test')]:
    del globals()[name]  # fastcore's own, which pytest would take for ours
