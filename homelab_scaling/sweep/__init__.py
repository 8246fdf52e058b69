"""Which run goes where: preparing a ladder, and launching its runs on this box."""
