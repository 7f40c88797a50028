"""python3 -m hack.cluster COMMAND."""

import sys

from hack.cluster.commands import main

sys.exit(main())
