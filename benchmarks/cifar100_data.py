"CIFAR-100 for the benchmarks: its three forms on disk, parts of it as tasks, and loaders for the two protocols."

from fastai.vision.all import *

from eed_fastai.data import array_dls, cifar100_stats, read_cifar100

__all__ = ['read_data', 'tasks', 'load', 'get_dls']

# Where no list says which images validate: the last so many of each class
n_validation = 50

# --- reading ----------------------------------------------------------------------------------------------------------

def read_sheet(file):
    "A sheet with 25 tiles a row as images `(n,32,32,3)`"
    sheet = np.asarray(Image.open(file).convert('RGB'))
    tiles = sheet.reshape(-1, 32, 25, 32, 3).swapaxes(1, 2)
    return tiles.reshape(-1, 32, 32, 3)

def read_part(path, vocab):
    "Images and classes of a folder with one sheet for each class"
    sheets = [read_sheet(path/f'{name}.webp') for name in vocab]
    classes = np.repeat(range_of(vocab), [len(sheet) for sheet in sheets])
    return np.concatenate(sheets), classes

def read_validation_list(file):
    "Class → the numbers of its tiles that validate; a line has a class and its numbers"
    lines = [line.split() for line in file.read_text().splitlines()]
    return {name: {int(o) for o in numbers} for name, *numbers in lines}

def read_sheets(path):
    "Class sheets as `read_cifar100` gives them, and which training images are validation tiles"
    vocab = sorted(file.stem for file in (path/'train').glob('*.webp'))
    train = read_part(path/'train', vocab)
    test = read_part(path/'test', vocab)
    validates = read_validation_list(path/'train-val.txt')
    counts = np.bincount(train[1], minlength=len(vocab))
    is_val = [i in validates[name] for name, n in zip(vocab, counts) for i in range(n)]
    return train, test, vocab, np.array(is_val)

def last_of_each_class(classes, n):
    "Which images are the last `n` of their class"
    is_last = np.zeros(len(classes), bool)
    for c in np.unique(classes):
        is_last[np.flatnonzero(classes==c)[-n:]] = True
    return is_last

def read_data(path):
    "Training set, test set, names, and which training images judge under 'select'"
    path = Path(path)
    if (path/'train-val.txt').exists():
        return read_sheets(path)
    train, test, vocab = read_cifar100(path)
    return train, test, vocab, last_of_each_class(train[1], n_validation)

# --- tasks ------------------------------------------------------------------------------------------------------------

# Name → every which class, and the first how many training images of each
tasks = {
    'cifar100': (1, 500),
    'cifar100-20x100': (5, 100),    # a small task that overfits
    'cifar100-100x100': (1, 100),
    'cifar100-100x25': (1, 25),
}

def rank_in_class(classes):
    "For each image, how many of its class come before it"
    ranks = np.empty(len(classes), int)
    for c in np.unique(classes):
        where = np.flatnonzero(classes==c)
        ranks[where] = np.arange(len(where))
    return ranks

def take(part, mask, kept):
    "Images and classes where `mask` holds; the classes are numbered anew, as they come in `kept`"
    images, classes = part
    return images[mask], np.searchsorted(kept, classes[mask])

def subset(train, test, vocab, is_val, every, first):
    "Every `every`-th class, and of each its first `first` training images"
    kept = np.arange(0, len(vocab), every)
    in_train = np.isin(train[1], kept) & (rank_in_class(train[1])<first)
    in_test = np.isin(test[1], kept)
    names = [vocab[c] for c in kept]
    return take(train, in_train, kept), take(test, in_test, kept), names, is_val[in_train]

@functools.lru_cache(1)
def load(path, task):
    "Training set, test set, names and validation images of a task, read once"
    return subset(*read_data(path), *tasks[task])

def get_dls(path, task, protocol, bs, device):
    "Loaders: under 'select' the validation images judge, under 'report' the test images"
    train, test, vocab, is_val = load(path, task)
    if protocol=='select':
        images, classes = train
        train = images[~is_val], classes[~is_val]
        test = images[is_val], classes[is_val]
    val_bs = 2*bs if device.type=='cpu' else 2000
    return array_dls(train, test, vocab, cifar100_stats, bs=bs, val_bs=val_bs, device=device)
