"""A sample of the zoo: of each family of timm and torchvision that has convolutional networks, one that is small.

`make zoo` puts all networks through the same; see tests/zoo.py for what is checked.
"""

import pytest
import timm
import torchvision

from tests.zoo import examine

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]

# By the module of timm.models that they are in.
TIMM = (
    "botnet26t_256 repvgg_a0 coat_lite_tiny convmixer_1024_20_ks9_p14 convnext_atto cpubone_nano csatv2 cs3darknet_s "
    "cspnext_tiny davit_tiny densenet121 dla46_c dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 "
    "mobilenetv2_035 efficientvim_m1 efficientvit_b0 efficientvit_m0 fasternet_t0 fastvit_t8 focalnet_tiny_srf "
    "gcvit_xxtiny ghostnet_050 hardcorenas_a hgnetv2_b0 hrnet_w18_small iformer_t inception_next_atto "
    "inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_conv_128s lowformer_b0 mambaout_femto "
    "maxvit_pico_rw_256 poolformer_s12 mobilenetv3_small_050 mobilenetv5_base mobilevit_xxs mvitv2_tiny "
    "nasnetalarge nextvit_small nf_regnet_b0 pnasnet5large pvt_v2_b0 rdnet_tiny regnetx_002 "
    "repghostnet_050 repvit_m0_9 res2net50_14w_8s resnest14d resnet18 resnetv2_18 rexnet_100 selecsls42 "
    "legacy_seresnet18 shvit_s1 skresnet18 starnet_s050 swiftformer_xs tiny_vit_5m_224 tresnet_m vgg11 visformer_tiny "
    "vit_small_r26_s32_224 vitamin_small_224 volo_d1_224 ese_vovnet19b_slim_dw legacy_xception xception41 "
    "xcit_nano_12_p16_224"
).split()
# By the module of torchvision.models that they are in.
TORCHVISION = (
    "alexnet convnext_tiny densenet121 efficientnet_b0 googlenet inception_v3 mnasnet0_5 mobilenet_v2 "
    "mobilenet_v3_small regnet_x_400mf resnet18 shufflenet_v2_x0_5 squeezenet1_1 vgg11 maxvit_t "
    "quantized_googlenet quantized_inception_v3 quantized_mobilenet_v2 quantized_mobilenet_v3_large "
    "quantized_resnet18 quantized_shufflenet_v2_x0_5 "
    "deeplabv3_mobilenet_v3_large fcn_resnet50 lraspp_mobilenet_v3_large fasterrcnn_mobilenet_v3_large_320_fpn "
    "fcos_resnet50_fpn keypointrcnn_resnet50_fpn maskrcnn_resnet50_fpn retinanet_resnet50_fpn "
    "ssdlite320_mobilenet_v3_large ssd300_vgg16 mvit_v2_s r3d_18 s3d raft_small"
).split()
# Nothing to hold: one convolution, before transformers.
NO_CNN = {
    "timm": (
        "beit cait convit crossvit deepseek_vit deit eva gemma4_vit hiera hieradet_sam2 mlp_mixer naflexvit nest pit "
        "qwen3_vit sequencer swin_transformer swin_transformer_v2 swin_transformer_v2_cr tnt twins vision_transformer "
        "vision_transformer_relpos vision_transformer_sam"
    ).split(),
    "torchvision": ["swin_transformer", "vision_transformer", "video.swin_transformer"],
}


@pytest.mark.parametrize("name", [*(f"timm:{n}" for n in TIMM), *(f"torchvision:{n}" for n in TORCHVISION)])
def test_every_mark_holds(name):
    row = examine(name)
    assert row.holds(), row
    assert row.status != "no CNN"
    assert not row.untraced


def test_the_sample_has_every_family():
    known = {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}
    assert {known[name] for name in TIMM} | set(NO_CNN["timm"]) == set(known.values())
    modules = {get_torchvision_module(name) for name in torchvision.models.list_models()}
    assert {get_torchvision_module(name) for name in TORCHVISION} | set(NO_CNN["torchvision"]) == modules


def get_torchvision_module(name):
    return torchvision.models.get_model_builder(name).__module__.removeprefix("torchvision.models.")
