"`python -m dainv`: the same as the program `dainv`."

import sys

from dainv.cli import main

sys.exit(main())
