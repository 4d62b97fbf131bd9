"Everything that a fastai user does with a Learner, for every way to bring the exits in."

import pytest
from conftest import *

COLUMNS = ['accuracy', 'exit0', 'exit1', 'exit2', 'main', 'ensemble', 'exit_loss', 'logit_loss']


# The ways in: a Learner, the callbacks for `fit`, and whether its table has a column for each exit afterwards
def from_constructor():
    return make_learner(EEDCallback()), None, True


def from_add_cb():
    return make_learner().add_cb(EEDCallback()), None, True


def from_late_add_cb():
    learn = make_learner()
    learn.create_opt()
    return learn.add_cb(EEDCallback()), None, True


def from_fit():
    return make_learner(), EEDCallback, False


def without_callback():
    return make_learner(model=multi_exit(tiny_resnet, n_out=10)), None, False


def after_remove_cb():
    return make_learner(EEDCallback()).remove_cb(EEDCallback), None, False


ways = [from_constructor, from_add_cb, from_late_add_cb, from_fit, without_callback, after_remove_cb]


def fit(learn, cbs):
    with learn.no_logging():
        learn.fit_one_cycle(1, 1e-2, cbs=cbs and cbs())


def check_fit_one_cycle(learn, cbs):
    fit(learn, cbs)
    assert all(np.isfinite(learn.final_record))


def check_lr_find(learn, cbs):
    assert learn.lr_find(num_it=6, show_plot=False, suggest_funcs=minimum)[0] > 0


def check_fine_tune(learn, cbs):
    with learn.no_logging():
        learn.fine_tune(1, 1e-2, cbs=cbs and cbs())
    assert np.isfinite(learn.final_record[0])


def check_validate(learn, cbs):
    fit(learn, cbs)
    assert learn.validate()[0] > 0


def check_get_preds(learn, cbs):
    fit(learn, cbs)
    p, y = learn.get_preds()
    assert p.shape == (32, 10) and y.shape == (32,) and torch.allclose(p.sum(1), torch.ones(32), atol=1e-5)


def check_get_preds_with_loss(learn, cbs):
    fit(learn, cbs)
    p, y, loss = learn.get_preds(with_loss=True)
    assert loss.shape == (32,) and torch.allclose(loss, F.nll_loss(p.log(), y, reduction='none'), atol=1e-4)


def check_get_preds_with_decoded(learn, cbs):
    fit(learn, cbs)
    p, y, dec = learn.get_preds(with_decoded=True)
    assert torch.equal(dec, p.argmax(1))


def check_predict(learn, cbs):
    fit(learn, cbs)
    label, idx, probs = learn.predict(all_digits.valid_ds.items[0][0])
    assert label in learn.dls.vocab and learn.dls.vocab[int(idx)] == label and probs.shape == (10,)


def check_tta(learn, cbs):
    fit(learn, cbs)
    p, y = learn.tta(n=2)
    assert p.shape == (32, 10)


def check_show_results(learn, cbs):
    fit(learn, cbs)
    learn.show_results(max_n=4)


def check_interpretation(learn, cbs):
    fit(learn, cbs)
    interp = ClassificationInterpretation.from_learner(learn)
    assert interp.confusion_matrix().sum() == 32 and len(interp.top_losses(3)[0]) == 3
    interp.plot_top_losses(2)


def check_summary(learn, cbs):
    fit(learn, cbs)
    assert 'Total params' in str(learn.summary())


def check_export(learn, cbs):
    fit(learn, cbs)
    item = all_digits.valid_ds.items[0][0]
    before = learn.predict(item)[2]
    learn.export('export.pkl')
    assert torch.allclose(load_learner('export.pkl').predict(item)[2], before, atol=1e-6)
    assert torch.allclose(learn.predict(item)[2], before, atol=1e-6)  # and this one still works


def check_fp16(learn, cbs):
    fit(learn.to_fp16(), cbs)
    fit(learn.to_fp32(), cbs)


def check_bf16(learn, cbs):
    fit(learn.to_bf16(), cbs)


checks = {k[6:]: v for k, v in list(globals().items()) if k.startswith('check_')}


@pytest.mark.parametrize('what', checks)
@pytest.mark.parametrize('way', ways, ids=lambda o: o.__name__)
def test_surface(way, what):
    learn, cbs, columns = way()
    if what == 'lr_find' and cbs:
        learn.model.build(10)  # `lr_find` takes no callbacks
    checks[what](learn, cbs)
    assert learn.metrics.attrgot('name') == (COLUMNS if columns else ['accuracy'])
    params = list(learn.model.parameters())
    if learn.opt is not None and not columns and what == 'export':
        return
    assert learn.opt is None or {id(p) for p in learn.opt.all_params().itemgot(0)} == {id(p) for p in params}


@pytest.mark.parametrize('way', [from_constructor, from_add_cb, from_late_add_cb, from_fit], ids=lambda o: o.__name__)
def test_every_parameter_is_trained(way):
    learn, cbs, _ = way()
    fit(learn, cbs)
    before = {n: p.detach().clone() for n, p in learn.model.named_parameters()}
    assert len(learn.opt.all_params()) == len(before) == 86
    if cbs:
        learn.fit(1, cbs=cbs())
    else:
        learn.fit(1)
    same = [n for n, p in learn.model.named_parameters() if torch.equal(p, before[n])]
    assert not same, same


def test_card_line():
    dls = small_digits()
    learn = Learner(dls, multi_exit(resnet18), cbs=EEDCallback())
    with learn.no_logging():
        learn.fit_one_cycle(1, 3e-3)
    assert learn.metrics.attrgot('name') == COLUMNS[1:]
    assert len(learn.opt.all_params()) == len(list(learn.model.parameters())) == 86


def test_no_classes_and_no_callback_names_both_fixes():
    learn = Learner(small_digits(), multi_exit(resnet18))
    with pytest.raises(RuntimeError, match=r'`n_out=`.*`EEDCallback\(\)`'):
        learn.fit(1)


@pytest.mark.parametrize('frozen', [False, True])
def test_to_eed_keeps_a_vision_learner(frozen):
    learn = vision_learner(small_digits(), resnet18, pretrained=False, metrics=accuracy)
    with learn.no_logging():
        learn.fit(1)
    before = learn.get_preds()[0]
    if frozen:
        learn.freeze()
    learn.to_eed()
    assert torch.allclose(learn.get_preds()[0], before, atol=1e-5)
    stem = learn.model.stages[0][0].weight.detach().clone()
    with learn.no_logging():
        learn.fit(1)
    assert torch.equal(stem, learn.model.stages[0][0].weight) == frozen  # what was frozen stays frozen
    assert len(learn.opt.all_params()) == len(list(learn.model.parameters()))
    with learn.no_logging():
        learn.fine_tune(1)
    assert learn.get_exit_preds()[0].shape == (32, 4, 10)


@pytest.mark.parametrize(
    'arch',
    [
        partial(models.mobilenet_v2, num_classes=10),
        partial(models.vgg11_bn, num_classes=10),
        partial(cifar_resnet18, n_out=10, width=8),
    ],
    ids=['mobilenet', 'vgg', 'cifar'],
)
def test_frozen_the_exits_alone_learn(arch):
    "Batch norm's statistics stay, and so does every answer of the network; fine_tune then opens it"
    dls = small_digits()
    learn = Learner(dls, arch(), metrics=accuracy)
    with learn.no_logging():
        learn.fit(1)
    before, z = {k: v.clone() for k, v in learn.model.state_dict().items()}, learn.get_preds()[0]
    learn.to_eed()
    learn.freeze()
    heads = [h.fc.weight.detach().clone() for h in learn.model.heads[:-1]]
    with learn.no_logging():
        learn.fit(2, 1e-2)
    assert torch.equal(learn.get_preds()[0], z) or torch.allclose(learn.get_preds()[0], z, rtol=1e-4, atol=1e-6)
    kept = {id(p) for p in [*learn.model.stages.parameters(), *learn.model.heads[-1].parameters()]}
    assert all(p.requires_grad == (id(p) not in kept) for p in learn.model.parameters())
    ours = {k: v for m in (*learn.model.stages, learn.model.heads[-1]) for k, v in m.state_dict().items()}
    assert sum(any(torch.equal(v, o) for o in before.values() if o.shape == v.shape) for v in ours.values()) == len(
        ours
    )  # to the last bit
    assert not any(torch.equal(a, h.fc.weight) for a, h in zip(heads, learn.model.heads[:-1]))
    with learn.no_logging():
        learn.fine_tune(1)
    assert all(p.requires_grad for p in learn.model.parameters())
    first = next(m for m in learn.model.stages.modules() if isinstance(m, nn.BatchNorm2d))
    assert not any(torch.equal(first.running_mean, o) for o in before.values() if o.shape == first.running_mean.shape)


def test_a_trained_network_in_multi_exit_learner():
    net = cifar_resnet18(n_out=10, width=8)
    learn = multi_exit_learner(small_digits(), net)  # frozen, as published weights are
    z = learn.get_preds()[0]
    with learn.no_logging():
        learn.fit(1, 1e-2)
    assert torch.allclose(learn.get_preds()[0], z, rtol=1e-4, atol=1e-6)


def test_to_eed_that_fails_changes_nothing():
    learn = vision_learner(small_digits(), resnet18, pretrained=False)
    model = learn.model
    with pytest.raises(ValueError):
        learn.to_eed(head=PooledHead, beta=1.0)
    assert learn.model is model and not learn._grab_cbs(EEDCallback)


@pytest.mark.parametrize('compile', [False, True], ids=['eager', 'compiled'])
def test_unseen_wrappers(compile):
    learn = make_learner(EEDCallback())
    learn.model = torch.compile(learn.model, backend='eager') if compile else nn.DataParallel(learn.model)
    with learn.no_logging():
        learn.fit(1)
    assert learn.validate()[2] >= 0 and unwrap(learn.model).want_exits is False
    learn.remove_cb(EEDCallback)
    assert learn.get_preds()[0].shape == (32, 10)
