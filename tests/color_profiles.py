"""ICC profiles that cameras, telephones and scanners write, made from their published numbers."""

import struct

import numpy as np

# x and y of red, green and blue.
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
DISPLAY_P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE_RGB = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))
D50 = np.array([0.9642, 1, 0.8249])
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)


def xyz(x, y):
    return np.array([x / y, 1, (1 - x - y) / y])


def to_xyz(primaries):
    """The matrix from linear RGB, white D65, to XYZ with white D50."""
    white = xyz(0.3127, 0.3290)
    matrix = np.stack([xyz(*primary) for primary in primaries], 1)
    matrix = matrix * np.linalg.solve(matrix, white)
    scale = np.diag((BRADFORD @ D50) / (BRADFORD @ white))
    return np.linalg.inv(BRADFORD) @ scale @ BRADFORD @ matrix


def profile(primaries, gamma, space=b"RGB ", padding=0):
    """An ICC profile; gray without primaries; with so many bytes that say nothing."""

    def fixed(values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    def point(values):
        return b"XYZ \0\0\0\0" + fixed(values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    tags = {b"desc": b"desc" + bytes(7) + b"\5test\0" + bytes(82 + padding), b"wtpt": point(D50)}
    if primaries is None:
        tags |= {b"kTRC": curve}
    else:
        columns = zip((b"r", b"g", b"b"), to_xyz(primaries).T, strict=True)
        for name, column in columns:
            tags |= {name + b"XYZ": point(column), name + b"TRC": curve}
    at, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", at + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s", at + len(body), b"none", 0x02100000, b"mntr", space, b"XYZ ")
    head += bytes(12) + b"acsp" + bytes(28) + fixed(D50) + bytes(48)
    return head + table + body


def in_srgb(pixels, primaries, gamma):
    """Works out by hand what sRGB shows of [..., 3] pixels with such a profile, 0 to 255."""
    linear = (np.asarray(pixels) / 255) ** gamma
    linear = linear @ (np.linalg.inv(to_xyz(SRGB)) @ to_xyz(primaries)).T
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(
        linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055
    )
