import os

# a hub miss then fails at once instead of after half a minute of retries
os.environ["HF_HUB_OFFLINE"] = "1"
