"""libfastnorm from any language with a C interface: here Python's ctypes, without the package.

python embed_ctypes.py "$(python -c 'import fastnorm; print(fastnorm.get_library())')"
"""

import ctypes
import math
import sys
from array import array

FLOAT32, OK = 1, 0  # of fastnorm.h

library = ctypes.CDLL(sys.argv[1])
library.fastnorm_status_string.restype = ctypes.c_char_p
rows, columns = 3, 1000
x = array("f", (math.sin(at) for at in range(rows * columns)))
y = array("f", bytes(4 * rows * columns))
mean = (ctypes.c_double * rows)()


def address(values):
    return ctypes.c_void_p(values.buffer_info()[0])


status = library.fastnorm_layer_norm(
    FLOAT32, ctypes.c_int64(rows), ctypes.c_int64(columns), address(x), None, None,
    ctypes.c_double(1e-5), address(y), mean, None, None,
)
if status != OK:
    sys.exit(library.fastnorm_status_string(status).decode())
squares = sum(value * value for value in y[:columns]) / columns
print(f"layer norm: mean of the first row {mean[0]:.6f}, mean square of its result {squares:.4f}")
sys.exit(abs(squares - 1) > 1e-3 or abs(mean[0] - sum(x[:columns]) / columns) > 1e-6)
