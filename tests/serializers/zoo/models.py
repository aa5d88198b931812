"""The animals of the zoo: one function a model, with what it is fed."""

import keras
import numpy as np
from keras import layers

ROWS = 24
BACKEND = keras.backend.backend()


def features(columns=6, seed=0):
    return np.random.default_rng(seed).normal(size=(ROWS, columns)).astype("float32")


def target(seed=1):
    return np.random.default_rng(seed).normal(size=(ROWS, 1)).astype("float32")


def mlp(**compile_with):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8, activation="relu"), layers.Dense(1)])
    model.compile(**{"optimizer": "adam", "loss": "mse", **compile_with})
    return model


def sequential():
    return mlp(metrics=["mae"]), features(), target()


def functional():
    inputs = keras.Input((6,), name="in")
    x = layers.Dense(8, activation="gelu", kernel_regularizer=keras.regularizers.L2(0.01))(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.Dropout(0.4, seed=3)(x)
    x = layers.Add()([x, layers.Dense(8)(inputs)])
    model = keras.Model(inputs, layers.Dense(1, kernel_constraint="max_norm")(x), name="net")
    model.compile(keras.optimizers.AdamW(0.01, clipnorm=1.0), keras.losses.Huber(0.5), weighted_metrics=["mse"])
    return model, features(), target()


@keras.saving.register_keras_serializable(package="zoo")
class Subclassed(keras.Model):
    def __init__(self, units=4, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first = layers.Dense(units, activation="tanh")
        self.norm = layers.LayerNormalization()
        self.blocks = [layers.Dense(units) for _ in range(2)]
        self.named = {"out": layers.Dense(1)}

    def call(self, x, training=False):
        x = self.norm(self.first(x))
        for block in self.blocks:
            x = block(x)
        return self.named["out"](x)

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def subclassed():
    model = Subclassed(5)
    model.compile("rmsprop", "mse")
    return model, features(), target()


def shared_layers():
    shared = layers.Dense(4, name="shared")
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    model = keras.Model([a, b], layers.Dense(1)(layers.Concatenate()([shared(a), shared(b)])))
    model.compile("sgd", "mse")
    return model, [features(), features(seed=5)], target()


def nested():
    inner = keras.Sequential([keras.Input((6,)), layers.Dense(3), layers.BatchNormalization()], name="inner")
    inner.compile("adam", "mse")
    inner.fit(features(), features(3), verbose=0)
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(1)(inner(layers.Dense(6)(inputs))))
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True), "mse")
    return model, features(), target()


def multi_output():
    inputs = keras.Input((6,))
    hidden = layers.Dense(4)(inputs)
    model = keras.Model(inputs, {"p": layers.Dense(1, name="p")(hidden), "q": layers.Dense(2, name="q")(hidden)})
    model.compile("adam", {"p": "mse", "q": "mae"}, loss_weights={"p": 1.0, "q": 0.3}, metrics={"p": ["mae"]})
    return model, features(), {"p": target(), "q": features(2)}


def frozen():
    model = mlp()
    model.layers[0].trainable = False
    model.compile("adam", "mse")
    return model, features(), target()


def frozen_after_compile():
    model = mlp()
    model.fit(features(), target(), verbose=0)
    model.layers[0].trainable = False
    return model, features(), None


def convolution():
    model = keras.Sequential(
        [keras.Input((8, 8, 1)), layers.Conv2D(3, 3), layers.BatchNormalization(), layers.Flatten()]
    )
    model.add(layers.Dense(1, activation="sigmoid"))
    model.compile("nadam", "binary_crossentropy", metrics=["accuracy", keras.metrics.AUC()])
    x = np.random.default_rng(0).normal(size=(ROWS, 8, 8, 1)).astype("float32")
    return model, x, (target() > 0).astype("float32")


def recurrent():
    model = keras.Sequential([keras.Input((5,), dtype="int32"), layers.Embedding(20, 4, mask_zero=True)])
    # Torch draws the masks of an LSTM from its own generator, unmoved models included.
    model.add(layers.Bidirectional(layers.LSTM(3, recurrent_dropout=0.0 if BACKEND == "torch" else 0.2)))
    model.add(layers.Dense(1))
    model.compile("adagrad", "mse")
    return model, np.random.default_rng(0).integers(0, 20, size=(ROWS, 5)).astype("int32"), target()


def attention():
    inputs = keras.Input((4, 6))
    x = layers.MultiHeadAttention(2, 3)(inputs, inputs)
    model = keras.Model(
        inputs, layers.Dense(1)(layers.GlobalAveragePooling1D()(layers.EinsumDense("abc,cd->abd", (4, 5))(x)))
    )
    model.compile("lion", "mse")
    return model, np.random.default_rng(0).normal(size=(ROWS, 4, 6)).astype("float32"), target()


def low_precision(policy):
    def build():
        keras.config.set_dtype_policy(policy)
        try:
            model = keras.Sequential([keras.Input((6,)), layers.Dense(4), layers.BatchNormalization(), layers.Dense(1)])
        finally:
            keras.config.set_dtype_policy("float32")
        model.compile(keras.optimizers.SGD(0.01), "mse")
        return model, features(), target()

    return build


def quantized():
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8, activation="relu"), layers.Dense(1)])
    model.quantize("int8")
    return model, features(), None


def lora():
    model = mlp()
    model.layers[0].enable_lora(2)
    model.compile("adam", "mse")
    return model, features(), target()


def schedule():
    rate = keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)
    return mlp(optimizer=keras.optimizers.Adam(rate, amsgrad=True)), features(), target()


def moving_average():
    return mlp(optimizer=keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.9)), features(), target()


def accumulation():
    return mlp(optimizer=keras.optimizers.Adam(0.01, gradient_accumulation_steps=2)), features(), target()


def changed_rate():
    model = mlp()
    model.optimizer.learning_rate = 0.25
    return model, features(), target()


def loss_scale():
    return mlp(optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01))), features(), target()


def uncompiled():
    return keras.Sequential([keras.Input((6,)), layers.Dense(2)]), features(), None


def unbuilt():
    model = keras.Sequential([layers.Dense(2), layers.Dropout(0.1), layers.Dense(1)])
    model.compile("adam", "mse")
    return model, None, None


def never_trained():
    return mlp(), features(), None


def normalization():
    layer = layers.Normalization()
    layer.adapt(features() * 3 + 1)
    model = keras.Sequential([keras.Input((6,)), layer, layers.Dense(1)])
    model.compile("adam", "mse")
    return model, features(), target()


def discretization():
    layer = layers.Discretization(num_bins=4)
    layer.adapt(features(1))
    model = keras.Sequential([keras.Input((1,)), layer, layers.CategoryEncoding(4), layers.Dense(1)])
    model.compile("adam", "mse")
    return model, features(1), target()


def vocabulary():
    words = keras.ops.convert_to_tensor([["red"], ["green"], ["red"], ["blue"]] * 6)
    lookup = layers.StringLookup(output_mode="tf_idf")
    lookup.adapt(words)
    model = keras.Sequential([keras.Input((1,), dtype="string"), lookup, layers.Dense(1)])
    model.compile("adam", "mse")
    return model, words, target()


def text():
    sentences = keras.ops.convert_to_tensor([["a red house"], ["a green house on a hill"]] * 12)
    split = layers.TextVectorization(output_sequence_length=4)
    split.adapt(sentences)
    model = keras.Sequential([keras.Input((1,), dtype="string"), split, layers.Embedding(20, 2), layers.Flatten()])
    model.add(layers.Dense(1))
    model.compile("adam", "mse")
    return model, sentences, target()


def constant_in_graph():
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.Dense(1)(inputs * np.arange(6.0, dtype="float32")))
    model.compile("adam", "mse")
    return model, features(), target()


@keras.saving.register_keras_serializable(package="zoo")
class Adversarial(keras.Model):
    """Two optimizers, set by a ``compile`` of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(1)
        self.loss_tracker = keras.metrics.Mean(name="loss")

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.dense(x)

    def compile(self, d_optimizer, g_optimizer):
        super().compile()
        self.d_optimizer, self.g_optimizer = d_optimizer, g_optimizer


def adversarial():
    model = Adversarial()
    model.build((None, 6))
    model.compile(keras.optimizers.Adam(0.3), keras.optimizers.SGD(0.2, momentum=0.5))
    for optimizer in (model.d_optimizer, model.g_optimizer):
        optimizer.build(model.trainable_variables)
        optimizer.apply([variable * 0 + 1.0 for variable in model.trainable_variables])
    return model, features(), None


ZOO = {
    make.__name__: make
    for make in (
        sequential, functional, subclassed, shared_layers, nested, multi_output, frozen, frozen_after_compile,
        convolution, recurrent, attention, quantized, lora, schedule, moving_average, accumulation, changed_rate,
        loss_scale, uncompiled, unbuilt, never_trained, normalization, discretization, constant_in_graph, adversarial,
    )
}  # fmt: skip
if BACKEND == "tensorflow":  # the others have no strings
    ZOO |= {"vocabulary": vocabulary, "text": text}
if BACKEND == "jax":
    del ZOO["moving_average"]  # a second fit fails on JAX, moved or not: "Attempt to donate the same buffer twice"
ZOO |= {policy: low_precision(policy) for policy in ("float16", "bfloat16", "mixed_float16", "mixed_bfloat16")}
