from __future__ import annotations

import sys
from pathlib import Path

# Tests are imported with importlib, which leaves sys.path alone; the synthetic traffic lies beside them.
sys.path.insert(0, str(Path(__file__).parent))
