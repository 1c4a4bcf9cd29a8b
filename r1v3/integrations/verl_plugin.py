"""The entry point that verl loads when it is imported: registers r1v3's loss and advantage."""

from r1v3.integrations.verl import register

register()
