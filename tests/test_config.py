"""The names an AMD Quark user has: what they translate to, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnxruntime.quantization import CalibrationDataReader

import small_llama
from onnx_quarot import ConfigError, DataError, ModelQuantizer, session
from onnx_quarot.load import load
from onnx_quarot.quantization.config import QConfig, get_default_config
from onnx_quarot.quantization.config.algorithm import (
    AdaRoundConfig,
    AlgoConfig,
    CLEConfig,
    GPTQConfig,
    QuarotConfig,
    SmoothQuantConfig,
)
from onnx_quarot.quantization.config.spec import (
    BFP16Spec,
    CalibMethod,
    Int4Spec,
    Int8Spec,
    Int16Spec,
    QLayerConfig,
    QTensorConfig,
    QuantGranularity,
    ScaleType,
    UInt8Spec,
    UInt16Spec,
    XInt8Spec,
)
from onnx_quarot.quantization.translate import translate
from onnx_quarot.scheme import parse_scheme
from onnx_quarot.sites import linear_sites

LAYER = QLayerConfig(activation=UInt8Spec(), weight=Int8Spec())
CONFIG = small_llama.Config()


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Three prompts, as ONNX Runtime's users write it: `get_next` until None."""

    def __init__(self) -> None:
        rng = np.random.default_rng(7)
        self.batches = iter([small_llama.decoder_feeds(CONFIG, rng) for _ in range(3)])
        self.read = 0

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        self.read += batch is not None
        return batch


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_llama.save(tmp_path_factory.mktemp("llama") / "model.onnx", CONFIG)


def logits(path: Path) -> np.ndarray:
    feeds = small_llama.decoder_feeds(CONFIG, np.random.default_rng(1))
    found: np.ndarray = session(path, threads=1).run(["logits"], feeds)[0]
    return found


def count(path: Path, op_type: str) -> int:
    return sum(node.op_type == op_type for node in onnx.load(path, load_external_data=False).graph.node)


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


# --- the snippet -----------------------------------------------------------------------------------------------


def quantize(model: Path, output: Path, algo_config: list[AlgoConfig], **options: Any) -> Path:
    config = QConfig(LAYER, algo_config=algo_config, OpTypesToQuantize=["MatMul", "Gemm"], **options)
    assert ModelQuantizer(config).quantize_model(str(model), str(output), Reader()) is None
    return output


def test_quantizes_with_and_without_quarot(model: Path, tmp_path: Path) -> None:
    plain = quantize(model, tmp_path / "plain.onnx", [])
    rotated = quantize(model, tmp_path / "quarot.onnx", [QuarotConfig()])
    assert count(plain, "Hadamard") == 0
    assert count(rotated, "Hadamard") >= CONFIG.layers
    assert count(plain, "QuantizeLinear") > 0
    expected = logits(model)
    assert relative(logits(rotated), expected) < relative(logits(plain), expected) < 1


def test_rotation_config_file_is_honoured(model: Path, tmp_path: Path) -> None:
    from onnx_quarot import discover
    from onnx_quarot.load import load
    from onnx_quarot.rotation_config import write_rotation_config

    pairs = write_rotation_config(load(model), discover(model))
    assert pairs["R1_pairs"]
    file = tmp_path / "rotation_config.json"
    file.write_text(json.dumps(pairs))
    asked = QuarotConfig(r_matrix_dim=CONFIG.hidden, use_random_had=False, r_config_path=str(file))
    output = quantize(model, tmp_path / "out.onnx", [asked])
    assert relative(logits(output), logits(model)) < 0.2

    pairs["R1_pairs"][0]["norm_node"] = "no such node"
    file.write_text(json.dumps(pairs))
    with pytest.raises(ConfigError, match="no such node"):
        quantize(model, tmp_path / "bad.onnx", [asked])
    assert not (tmp_path / "bad.onnx").exists()


def test_matrix_size_that_contradicts_the_model(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"r_matrix_dim.*4096.*{CONFIG.hidden}"):
        quantize(model, tmp_path / "out.onnx", [QuarotConfig(r_matrix_dim=4096)])
    assert list(tmp_path.iterdir()) == []


def test_random_signs_are_the_same_every_time(model: Path, tmp_path: Path) -> None:
    outputs = [
        quantize(model, tmp_path / f"{i}.onnx", [QuarotConfig(use_random_had=True, seed=seed)])
        for i, seed in enumerate((None, 0, 1))
    ]
    first, same, other = (logits(path) for path in outputs)
    np.testing.assert_array_equal(first, same)
    assert not np.array_equal(first, other)


def test_models_in_memory(model: Path) -> None:
    source = onnx.load(model)
    before = source.SerializeToString(deterministic=True)
    found = ModelQuantizer(QConfig(LAYER)).quantize_model(source, calibration_data_reader=Reader())
    assert source.SerializeToString(deterministic=True) == before
    assert isinstance(found, onnx.ModelProto)
    opened = ort.InferenceSession(found.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = small_llama.decoder_feeds(CONFIG, np.random.default_rng(1))
    assert relative(opened.run(["logits"], feeds)[0], logits(model)) < 0.5


def test_external_data_where_it_is_asked_for(model: Path, tmp_path: Path) -> None:
    inside = quantize(model, tmp_path / "inside.onnx", [])
    assert not (tmp_path / "inside.onnx.data").exists()
    outside = quantize(model, tmp_path / "outside.onnx", [], use_external_data_format=True)
    assert (tmp_path / "outside.onnx.data").stat().st_size > outside.stat().st_size
    np.testing.assert_array_equal(logits(inside), logits(outside))


def test_calibration_sources(model: Path, tmp_path: Path) -> None:
    quantizer = ModelQuantizer(QConfig(LAYER))
    with pytest.raises(ConfigError, match="neither"):
        quantizer.quantize_model(model, tmp_path / "out.onnx")
    with pytest.raises(ConfigError, match="both"):
        quantizer.quantize_model(model, tmp_path / "out.onnx", Reader(), "data.npz")
    with pytest.raises(DataError, match=r"data\.npz"):
        quantizer.quantize_model(model, tmp_path / "out.onnx", calibration_data_path=tmp_path / "data.npz")
    reader = Reader()
    ModelQuantizer(QConfig(LAYER, CalibDataSize=2)).quantize_model(model, tmp_path / "out.onnx", reader)
    assert reader.read == 2


def test_exclude_leaves_a_layer_alone(model: Path, tmp_path: Path) -> None:
    everything = quantize(model, tmp_path / "all.onnx", [])
    less = quantize(model, tmp_path / "less.onnx", [], exclude=["/lm_head/MatMul"])
    weights = [count(path, "DequantizeLinear") for path in (everything, less)]
    assert weights[1] < weights[0]
    with pytest.raises(ConfigError, match="no_such_layer"):
        quantize(model, tmp_path / "bad.onnx", [], exclude=["no_such_layer"])


# --- translation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "signed", "symmetric"),
    [
        (UInt8Spec(), False, False),
        (UInt8Spec(symmetric=True), False, True),
        (Int8Spec(), True, True),
        (Int8Spec(symmetric=False), True, False),
    ],
)
def test_activation_specs(spec: QTensorConfig, signed: bool, symmetric: bool) -> None:
    activation = translate(QConfig(QLayerConfig(activation=spec, weight=Int8Spec())))["scheme"].activation
    assert (activation.bits, activation.signed, activation.symmetric) == (8, signed, symmetric)
    assert not activation.per_channel


@pytest.mark.parametrize(
    ("given", "per_channel"),
    [(None, True), (QuantGranularity.Channel, True), (QuantGranularity.Tensor, False)],
)
def test_weight_granularity(given: QuantGranularity | None, per_channel: bool) -> None:
    layer = QLayerConfig(activation=UInt8Spec(), weight=Int8Spec(quant_granularity=given))
    assert translate(QConfig(layer))["scheme"].weight.per_channel is per_channel


@pytest.mark.parametrize(
    ("given", "method"),
    [
        (CalibMethod.MinMax, "minmax"),
        (CalibMethod.MinMSE, "mse"),
        (CalibMethod.Percentile, "percentile"),
        (CalibMethod.Entropy, "entropy"),
        (None, parse_scheme("a8w8").activation.method),
    ],
)
def test_calibration_method_reaches_the_pipeline(given: CalibMethod | None, method: str) -> None:
    layer = QLayerConfig(UInt8Spec(calibration_method=given), weight=Int8Spec())
    keywords = translate(QConfig(layer))
    assert keywords["method"] == keywords["scheme"].activation.method == method


def test_algorithms_argument_stands_in_for_the_configured_ones() -> None:
    config = QConfig(LAYER, algo_config=[QuarotConfig()])
    assert translate(config)["rotations"] == ("R1", "R2", "R4")
    assert translate(config, [])["rotations"] == ()
    assert translate(QConfig(LAYER), [QuarotConfig(r_matrix_dim=64)])["matrix_dim"] == 64


def test_sixteen_and_four_bits_and_gptq() -> None:
    wide = translate(QConfig(QLayerConfig(UInt16Spec(), weight=Int4Spec()), algo_config=[GPTQConfig(bits=4, mse=True)]))
    scheme = wide["scheme"]
    assert (scheme.name, scheme.activation.bits, scheme.activation.method) == ("a16w4", 16, "minmax")
    assert (scheme.weight.bits, scheme.weights, scheme.weight.method, scheme.damping) == (4, "gptq", "mse", 0.01)
    assert wide["rotations"] == ()
    plain = translate(QConfig(layer(weight=Int8Spec(calibration_method=CalibMethod.MinMax))))["scheme"]
    assert (plain.weight.method, plain.weights) == ("minmax", "rtn")


def test_layers_by_name_and_type(tmp_path: Path) -> None:
    """A name counts before a type, and None means floating point."""
    wide = QLayerConfig(UInt16Spec(), weight=Int8Spec())
    config = QConfig(
        LAYER,
        specific_layer_config={wide: ["/model/layers.0/mlp/down_proj/MatMul"], None: ["/lm_head/MatMul"]},
        layer_type_config={QLayerConfig(Int8Spec(), weight=Int8Spec()): ["MatMul"]},
    )
    small_llama.save(tmp_path / "m.onnx", CONFIG)
    ModelQuantizer(config).quantize_model(tmp_path / "m.onnx", tmp_path / "q.onnx", Reader())
    graph = onnx.load(tmp_path / "q.onnx").graph
    types = {t.name: t.data_type for t in graph.initializer}
    made = [types[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"]
    assert made.count(onnx.TensorProto.UINT16) == 1
    assert set(made) == {onnx.TensorProto.UINT16, onnx.TensorProto.INT8}
    head = next(n for n in graph.node if n.name == "/lm_head/MatMul")
    assert types[head.input[1]] == onnx.TensorProto.FLOAT
    unknown = QConfig(LAYER, specific_layer_config={wide: ["no_such_layer"]})
    with pytest.raises(ConfigError, match="'no_such_layer' fits no linear layer"):
        ModelQuantizer(unknown).quantize_model(tmp_path / "m.onnx", tmp_path / "q.onnx", Reader())


def layer(**parts: QTensorConfig) -> QLayerConfig:
    return QLayerConfig(**{"activation": UInt8Spec(), "weight": Int8Spec(), **parts})


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (QConfig(layer(activation=Int4Spec())), "activation.*Int4"),
        (QConfig(layer(activation=BFP16Spec())), "activation.*BFP16"),
        (QConfig(layer(weight=Int16Spec())), "weight.*Int16"),
        (QConfig(layer(weight=UInt8Spec())), "weight.*UInt8"),
        (QConfig(layer(weight=Int8Spec(symmetric=False))), "weight.*symmetric"),
        (QConfig(layer(weight=XInt8Spec())), "weight.*PowerOf2"),
        (QConfig(layer(activation=UInt8Spec(scale_type=ScaleType.Int16))), r"activation.*ScaleType\.Int16"),
        (QConfig(layer(activation=UInt8Spec(calibration_method=CalibMethod.Distribution))), "activation.*Distribution"),
        (QConfig(layer(weight=Int8Spec(calibration_method=CalibMethod.Entropy))), "weight.*Entropy"),
        (QConfig(layer(activation=UInt8Spec(quant_granularity=QuantGranularity.Channel))), "Channel"),
        (QConfig(layer(weight=Int8Spec(quant_granularity=QuantGranularity.Group))), "weight.*Group"),
        (QConfig(layer(bias=Int8Spec())), "bias"),
        (QConfig(layer(output_tensors=UInt8Spec())), "output_tensors"),
        (QConfig(QLayerConfig(weight=Int8Spec())), "activation"),
        (QConfig(QLayerConfig(activation=UInt8Spec())), "weight"),
        (QConfig(LAYER, specific_layer_config={"int8": ["a"]}), "specific_layer_config.*int8"),
        (QConfig(LAYER, specific_layer_config={LAYER: "a"}), "specific_layer_config.*list"),
        (QConfig(LAYER, specific_layer_config={layer(weight=UInt8Spec()): ["a"]}), "weight.*UInt8"),
        (QConfig(LAYER, layer_type_config={LAYER: ["Conv"]}), "layer_type_config"),
        (QConfig(LAYER, exclude=[(["a"], ["b"])]), "exclude.*subgraph"),
        (QConfig(LAYER, algo_config=[SmoothQuantConfig(alpha=0.7)]), "SmoothQuantConfig"),
        (QConfig(LAYER, algo_config=[GPTQConfig(bits=4)]), "GPTQConfig has bits 4.*Int8"),
        (QConfig(LAYER, algo_config=[GPTQConfig(act_order=True)]), "GPTQConfig has act_order True"),
        (QConfig(LAYER, algo_config=[GPTQConfig(group_size=64)]), "GPTQConfig has group_size 64"),
        (QConfig(LAYER, algo_config=[GPTQConfig(perc_damp=0)]), "perc_damp 0"),
        (QConfig(LAYER, algo_config=[GPTQConfig(), GPTQConfig()]), "2 GPTQConfigs"),
        (QConfig(LAYER, algo_config=[CLEConfig(cle_steps=2)]), "CLEConfig"),
        (QConfig(LAYER, algo_config=[QuarotConfig(), AdaRoundConfig()]), "AdaRoundConfig"),
        (QConfig(LAYER, algo_config=[QuarotConfig(), QuarotConfig()]), "2 QuarotConfigs"),
        (QConfig(LAYER, Int32Bias=True), "Int32Bias"),
        (QConfig(LAYER, extra_options={"ActivationSymmetric": True}), "ActivationSymmetric"),
        (QConfig(LAYER, OpTypesToQuantize=["Conv"]), "Conv"),
        (QConfig(LAYER, OpTypesToQuantize="MatMul"), "OpTypesToQuantize"),
        (QConfig(LAYER, CalibDataSize=0), "CalibDataSize"),
        (QConfig(LAYER, MatMulConstBOnly=False), "MatMulConstBOnly"),
    ],
)
def test_what_is_not_supported_is_named_before_any_work(config: QConfig, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as found:
        ModelQuantizer(config)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: QConfig(UInt8Spec()), "global_config"),
        (lambda: QConfig(LAYER, exclude="node"), "exclude"),
        (lambda: QConfig(LAYER, algo_config=QuarotConfig()), "algo_config"),
        (lambda: QConfig(LAYER, extra_options=3), "extra_options"),
        (lambda: QLayerConfig(activation=UInt8Spec), "activation.*UInt8Spec"),
        (lambda: QLayerConfig(activation=UInt8Spec(), input_tensors=Int8Spec()), "input_tensors"),
        (lambda: UInt8Spec(calibration_method="Median"), "calibration_method.*Median"),
        (lambda: UInt8Spec(data_type="Int7"), "Int7"),
        (lambda: QuarotConfig(r_matrix_dim=0), "r_matrix_dim"),
        (lambda: QuarotConfig(seed=3), "seed"),
        (lambda: ModelQuantizer({}), "QConfig"),
    ],
)
def test_wrong_kinds_of_values(make: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make()


# --- as dictionaries -------------------------------------------------------------------------------------------


def test_round_trip_through_json() -> None:
    config = QConfig(
        layer(activation=UInt8Spec(calibration_method=CalibMethod.MinMax)),
        specific_layer_config={QLayerConfig(weight=Int16Spec()): ["a", "b"]},
        exclude=["c"],
        algo_config=[QuarotConfig(r_matrix_dim=64, use_random_had=True, seed=5), SmoothQuantConfig()],
        use_external_data_format=True,
        OpTypesToQuantize=["MatMul"],
    )
    again = QConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert again != QConfig(LAYER)


def test_dictionaries_with_unknown_keys() -> None:
    good = QConfig(LAYER).to_dict()
    with pytest.raises(ConfigError, match="colour"):
        QConfig.from_dict({**good, "colour": 1})
    with pytest.raises(ConfigError, match="global_config"):
        QConfig.from_dict({})
    with pytest.raises(ConfigError, match="kernel"):
        QLayerConfig.from_dict({"kernel": {}})
    with pytest.raises(ConfigError, match="magic"):
        QConfig.from_dict({**good, "algo_config": [{"name": "magic"}]})
    with pytest.raises(ConfigError, match="angle"):
        QConfig.from_dict({**good, "algo_config": [{"name": "quarot", "angle": 3}]})


def test_default_configs() -> None:
    assert translate(QConfig.get_default_config("A8W8"))["scheme"].activation.signed
    assert not translate(get_default_config("U8S8_AAWS"))["scheme"].activation.signed
    with pytest.raises(ConfigError, match="XINT8"):
        get_default_config("XINT8")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"global_config": True}, "layer config is True; it must be a dict"),
        ({"global_config": {"weight": [1]}}, r"tensor config is \[1\]; it must be a dict"),
        ({"algo_config": 5}, "algo_config is 5; it must be a list"),
        ({"algo_config": [{"name": []}]}, r"algorithm name is \[\]"),
        ({"exclude": 1.5}, "exclude is 1.5; it must be a list"),
        ({"layer_type_config": [[{}]]}, "an entry of layer_type_config is not a pair"),
        ({"layer_type_config": [[{}, "MatMul"]]}, "names in layer_type_config is 'MatMul'; it must be a list"),
    ],
)
def test_dictionaries_of_another_form(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QConfig.from_dict({**QConfig.get_default_config("A8W8").to_dict(), **change})
    with pytest.raises(ConfigError, match="config is 'text'; it must be a dict"):
        QConfig.from_dict("text")  # type: ignore[arg-type]


@pytest.mark.parametrize("algorithms", [[], [QuarotConfig(), GPTQConfig(bits=4, per_channel=True)]], ids=len)
def test_four_bit_weights_of_a_tied_head_can_be_run(model: Path, tmp_path: Path, algorithms: list[AlgoConfig]) -> None:
    """Tables do not look up 4-bit rows, which ONNX Runtime's Gather does not know."""
    config = QConfig(QLayerConfig(activation=UInt8Spec(), weight=Int4Spec()), algo_config=algorithms)
    ModelQuantizer(config).quantize_model(model, tmp_path / "q.onnx", Reader())
    # Several prompts: of a single one the error is a matter of chance.
    feeds = [small_llama.decoder_feeds(CONFIG, np.random.default_rng(seed)) for seed in range(4)]
    runs = (session(path) for path in (model, tmp_path / "q.onnx"))
    a, b = (np.concatenate([run.run(["logits"], prompt)[0] for prompt in feeds], axis=1) for run in runs)
    assert np.linalg.norm(a - b) < 0.5 * np.linalg.norm(a)


def test_exclude_takes_regular_expressions(model: Path, tmp_path: Path) -> None:
    config = QConfig(LAYER, exclude=[r"^/model/layers\.0/.*(up|down)_proj"])
    ModelQuantizer(config).quantize_model(model, tmp_path / "q.onnx", Reader())
    left = {site.node_name for site in linear_sites(load(tmp_path / "q.onnx"))}
    assert left == {"/model/layers.0/mlp/up_proj/MatMul", "/model/layers.0/mlp/down_proj/MatMul"}
    with pytest.raises(ConfigError, match=r"exclude: '\^\(' is no regular expression"):
        ModelQuantizer(QConfig(LAYER, exclude=["^("])).quantize_model(model, tmp_path / "q.onnx", Reader())
