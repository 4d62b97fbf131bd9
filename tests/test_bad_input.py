"Every mistake has a message that says what was found, what was expected and what to do."

import pytest
from conftest import *


def fails(exc, *parts):
    return pytest.raises(exc, match='(?s)' + '.*'.join(map(re.escape, parts)))


def raw_dls(x=None, y=None, bs=4):
    x, y = ifnone(x, torch.randn(8, 3, 32, 32)), ifnone(y, torch.arange(8) % 3)
    ds = list(zip(x, y))
    return DataLoaders.from_dsets(ds, ds, bs=bs, num_workers=0)


def test_no_number_of_classes():
    with fails(ValueError, 'number of classes is not known', '`n_out=`', 'dls.c'):
        Learner(raw_dls(), multi_exit(tiny_resnet), loss_func=CrossEntropyLossFlat(), cbs=EEDCallback())
    dls = raw_dls()
    dls.c = 3  # one of the two fixes
    assert Learner(dls, multi_exit(tiny_resnet), loss_func=CrossEntropyLossFlat(), cbs=EEDCallback()).model.n_out == 3
    Learner(raw_dls(), multi_exit(tiny_resnet, n_out=3), loss_func=CrossEntropyLossFlat(), cbs=EEDCallback()).fit(1)


def test_n_out_that_disagrees():
    with fails(ValueError, '7 classes', 'the data has 10', 'Leave `n_out` out'):
        make_learner(EEDCallback(), model=multi_exit(tiny_resnet, n_out=7))


def test_beta_with_heads_without_features():
    with fails(ValueError, 'beta=1.0', '[None, None, None, None]', 'beta=0'):
        make_learner(EEDCallback(beta=1.0), model=multi_exit(tiny_resnet, head=PooledHead))


def test_beta_with_features_of_different_sizes():
    narrow = lambda ni, widths, n_out: ExitHead(ni, widths[:-1], n_out)
    with fails(ValueError, 'sizes are', '(32,)', 'heads that give features of one size'):
        make_learner(EEDCallback(beta=0.5), model=multi_exit(tiny_resnet, head=narrow))
    learn = make_learner(EEDCallback(), model=multi_exit(tiny_resnet, head=narrow))  # without beta it trains
    with learn.no_logging():
        learn.fit(1)


def test_refusals_leave_the_network_as_it_was():
    net = models.googlenet(init_weights=False)  # has auxiliary classifiers
    net.conv1.bn.eval()
    before, modes = {k: v.clone() for k, v in net.state_dict().items()}, [m.training for m in net.modules()]
    with pytest.raises(ValueError):
        multi_exit(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and modes == [
        m.training for m in net.modules()
    ]
    assert not any(m._forward_pre_hooks for m in net.modules())


def test_wrong_cuts():
    with fails(ValueError, "'layer9'", 'the parts after the first are', 'layer1'):
        multi_exit(resnet18, 10, cuts=['layer9'])


@pytest.mark.parametrize('size,ok', [(4, False), (8, True)])
def test_images_too_small(size, ok):
    dls = raw_dls(torch.randn(8, 3, size, size))
    learn = Learner(dls, multi_exit(tiny_resnet, n_out=3), loss_func=CrossEntropyLossFlat(), cbs=EEDCallback())
    if ok:
        learn.fit(1)
    else:
        with fails(ValueError, 'too small', 'single cell', 'larger images'):
            learn.fit(1)


def test_wrong_channels():
    learn = Learner(
        raw_dls(torch.randn(8, 1, 32, 32)),
        multi_exit(tiny_resnet, n_out=3),
        loss_func=CrossEntropyLossFlat(),
        cbs=EEDCallback(),
    )
    with fails(ValueError, '(4, 1, 32, 32)', '(batch, 3,', '`n_in=`'):
        learn.fit(1)


@pytest.mark.parametrize('y', [3, -1])
def test_targets_out_of_range(y):
    learn = Learner(
        raw_dls(y=torch.tensor([0, 1, 2, 0, 1, 2, 0, y])),
        multi_exit(tiny_resnet, n_out=3),
        loss_func=CrossEntropyLossFlat(),
        cbs=EEDCallback(),
    )
    with fails(ValueError, 'targets go from', '3 classes, 0 to 2'):
        learn.fit(1)


def test_ignored_targets_are_not_out_of_range():
    Learner(
        raw_dls(y=torch.tensor([0, 1, 2, 0, 1, 2, 0, -100])),
        multi_exit(tiny_resnet, n_out=3),
        loss_func=CrossEntropyLossFlat(),
        cbs=EEDCallback(),
    ).fit(1)


def test_callback_on_a_plain_model():
    with fails(TypeError, 'ResNet', 'multi_exit(arch)', 'learn.to_eed()'):
        make_learner(EEDCallback(), model=resnet18(num_classes=10))
    learn = make_learner(model=resnet18(num_classes=10))
    with fails(TypeError, 'learn.to_eed()'):
        learn.fit(1, cbs=EEDCallback())
    assert not learn._grab_cbs(EEDCallback)


def test_two_callbacks():
    learn = make_learner(EEDCallback())
    with fails(ValueError, 'EEDCallback already', 'remove_cb'):
        learn.add_cb(EEDCallback())
    with fails(ValueError, 'EEDCallback already'):
        learn.to_eed()
    assert len(learn._grab_cbs(EEDCallback)) == 1
    with learn.no_logging():
        learn.fit(1)  # and the first one still works


@pytest.mark.parametrize(
    'teacher',
    [lambda z: z.mean(1), lambda z: z[:, :2], lambda z: z.mean(2, keepdim=True), lambda z: z[:1]],
    ids=['no exit axis', 'two of four', 'no classes', 'one image'],
)
def test_teacher_of_the_wrong_shape(teacher):
    with fails(ValueError, 'target of shape', 'expected', 'one for all exits'):
        make_learner(EEDCallback(teacher=teacher)).fit(1)


@pytest.mark.parametrize(
    'kw',
    [dict(alpha=-1.0), dict(beta=-0.1), dict(alpha=float('nan')), dict(beta=float('inf')), dict(alpha='1')],
    ids=str,
)
def test_weights(kw):
    with fails(ValueError, f'`{first(kw)}` is {first(kw.values())!r}', 'finite number, 0 or more'):
        EEDCallback(**kw)


@pytest.mark.parametrize('T', [0, -3.0, float('inf'), float('nan')])
def test_temperature(T):
    with fails(ValueError, f'T={T}', 'positive and finite'):
        logit_kl(torch.zeros(1, 2, 3), torch.zeros(1, 1, 3), T=T)


def test_misspelled_options_raise():
    with pytest.raises(TypeError):
        EEDCallback(apha=1.0)
    with pytest.raises(TypeError):
        logit_kl(torch.zeros(1, 2, 3), torch.zeros(1, 1, 3), temperature=4)
    with pytest.raises(TypeError):
        make_learner(model=resnet18(num_classes=10)).to_eed(apha=1.0)
    with pytest.raises(TypeError):
        multi_exit_learner(small_digits(), tiny_resnet, pretrained=False, metrix=accuracy)


def write_images(path, classes, n=4):
    for c in classes:
        (path / c).mkdir(parents=True, exist_ok=True)
        for i, (im, _) in enumerate(all_digits.train_ds.items[:n]):
            Image.fromarray(im).save(path / c / f'{i}.png')


def test_folders(tmp_path):
    d = tmp_path / 'set'
    with fails(FileNotFoundError, str(d)):
        folder_dls(d)
    d.mkdir()
    with fails(ValueError, 'no images', 'one folder for each class'):
        folder_dls(d)
    write_images(d, ['cat'])
    with fails(ValueError, '1 class', '(cat)', 'at least two'):
        folder_dls(d)
    write_images(d, ['dog'], 1)
    with fails(ValueError, 'one image only of dog'):
        folder_dls(d)
    write_images(d, ['dog'])
    assert len(folder_dls(d, bs=4, size=32, num_workers=0).valid_ds) == 2


def test_unreadable_image(tmp_path):
    write_images(tmp_path, ['cat', 'dog'], 6)
    (tmp_path / 'dog/broken.jpg').write_bytes(b'\xff\xd8\xff no image')
    whole = (tmp_path / 'cat/0.png').read_bytes()
    (tmp_path / 'cat/cut.png').write_bytes(whole[: len(whole) // 2])
    with fails(ValueError, '2 of 14 images cannot be read', 'cut.png', 'broken.jpg', 'skip_unreadable=True'):
        folder_dls(tmp_path)
    dls = folder_dls(tmp_path, bs=4, size=32, num_workers=0, skip_unreadable=True)
    assert len(dls.train_ds) + len(dls.valid_ds) == 12


def test_pretrained_without_weights():
    with fails(ValueError, 'takes neither `weights` nor `pretrained`'):
        multi_exit_learner(small_digits(), cifar_resnet18)


@pytest.mark.parametrize(
    'package,extra,use',
    [
        ('timm', 'timm', lambda: multi_exit('resnet18', 5)),
        ('torchmetrics', 'bench', lambda: ece(torch.randn(4, 5), torch.arange(4))),
        ('onnxscript', 'onnx', lambda: export_onnx(multi_exit(tiny_resnet, 5), 'never_made', 16)),
    ],
)
def test_an_extra_that_is_missing_is_named(monkeypatch, package, extra, use):
    for name in [o for o in sys.modules if o.split('.')[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"pip install 'eed_fastai\[{extra}\]'"):
        use()


@pytest.mark.parametrize(
    'use',
    [
        lambda m: early_exit(m, torch.randn(2, 3, 16, 16), [0.5]),
        lambda m: part_times(m, torch.randn(2, 3, 16, 16)),
        lambda m: EarlyExitModel(m, ExitPolicy([0.5])),
        lambda m: save_multi_exit(m, 'never_made'),
        lambda m: export_onnx(m, 'never_made', 16),
    ],
)
def test_a_network_without_exits(use):
    with fails(TypeError, 'Sequential has no exits', 'multi_exit'):
        use(nn.Sequential(nn.Conv2d(3, 5, 3)))


def test_a_kept_classifier_with_other_classes():
    with fails(ValueError, '5 classes', 'n_out=10'):
        multi_exit(cifar_resnet18(n_out=5, width=8), n_out=10)
    with fails(ValueError, '5 classes', 'the data has 10'):
        make_learner(EEDCallback(), model=multi_exit(cifar_resnet18(n_out=5, width=8)))


def test_to_eed_cannot_move_exits():
    with fails(ValueError, 'has exits already', '`cuts`, `head`, `size` and `n_exits`'):
        make_learner(model=multi_exit(tiny_resnet)).to_eed(head=PooledHead)


@pytest.mark.parametrize(
    'loss_func',
    [MSELossFlat(), BCEWithLogitsLossFlat(), nn.BCEWithLogitsLoss(), L1LossFlat()],
    ids=lambda o: type(getattr(o, 'func', o)).__name__,
)
def test_other_tasks_are_refused_by_their_loss(loss_func):
    with fails(ValueError, 'regression', 'one class per image', 'CrossEntropyLossFlat'):
        make_learner(EEDCallback(), loss_func=loss_func, model=multi_exit(tiny_resnet, n_out=10))


@pytest.mark.parametrize(
    'y',
    [
        torch.rand(8),
        torch.randint(2, (8, 3)),
        torch.randint(2, (8, 3)).float() + 0.01,
        torch.zeros(8, 4, 4, dtype=torch.long),
    ],
    ids=['regression', 'several labels', 'several labels as floats', 'a mask'],
)
def test_other_tasks_are_refused_by_their_targets(y):
    learn = Learner(
        raw_dls(torch.rand(8, 3, 32, 32), y),
        multi_exit(tiny_resnet, n_out=3),
        loss_func=lambda p, y: p.sum(),
        cbs=EEDCallback(exit_metric=lambda p, *y: p.sum()),
    )
    with fails(ValueError, 'The targets are', 'one class per image'), learn.no_logging():
        learn.fit(1)


def test_rows_of_probabilities_are_targets():
    learn = Learner(
        raw_dls(torch.rand(8, 3, 32, 32), torch.rand(8, 3).softmax(1)),
        multi_exit(tiny_resnet, n_out=3),
        loss_func=nn.CrossEntropyLoss(),
        cbs=EEDCallback(exit_metric=lambda p, *y: p.sum()),
    )
    with learn.no_logging():
        learn.fit(1)


def test_rows_of_probabilities_are_looked_at_once(monkeypatch):
    asked = []
    monkeypatch.setattr('eed_fastai.callback.are_probs', lambda y: asked.append(y) or True)
    learn = Learner(
        raw_dls(torch.rand(8, 3, 32, 32), torch.rand(8, 3).softmax(1), bs=2),
        multi_exit(tiny_resnet, n_out=3),
        loss_func=nn.CrossEntropyLoss(),
        cbs=EEDCallback(exit_metric=lambda p, *y: p.sum()),
    )
    with learn.no_logging():
        learn.fit(2)
    assert len(asked) == 1  # of 16 batches: on a GPU each look waits for it


@pytest.mark.parametrize(
    'kw,words',
    [
        (dict(label_weights=[1, 1]), '2 weights for 4 exits'),
        (dict(logit_weights=lambda k: [1] * (k + 1)), '5 weights for 4 exits'),
        (dict(label_weights=[1, 1, 1, -1]), 'label_weights'),
        (dict(logit_loss=lambda z, t: (z - t).abs().mean(), by_exit=True), 'takes no `w`'),
        (dict(teacher=ExternalTeacher), 'trained network'),
        (dict(teacher=ExternalTeacher(nn.Linear(2, 2)), beta=1.0), 'gives logits only'),
    ],
    ids=lambda o: o if isinstance(o, str) else '',
)
def test_what_a_recipe_may_get_wrong(kw, words):
    with fails((ValueError, TypeError), words):
        make_learner(EEDCallback(**kw))
