variable "name" {
  description = "Begins the name of everything that is made, such as neuroloop."
  type        = string
  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{2,20}$", var.name))
    error_message = "Lower-case letters, digits and hyphens, 3 to 21 of them, beginning with a letter."
  }
}

variable "unique" {
  description = "Letters and digits that make the names of storage account and registry unique in all of Azure."
  type        = string
  validation {
    condition     = can(regex("^[a-z0-9]{3,15}$", var.unique))
    error_message = "Lower-case letters and digits, 3 to 15 of them."
  }
}

variable "location" {
  description = "Region of everything, such as germanywestcentral."
  type        = string
}

variable "admins" {
  description = "Object ids of the Entra groups that administer the cluster."
  type        = list(string)
  default     = []
}

variable "api_from" {
  description = "Addresses from which the cluster's API can be reached; empty: it is private."
  type        = list(string)
  default     = []
}

variable "nodes" {
  description = "Ordinary nodes: size and how many of them."
  type        = object({ size = string, min = number, max = number })
  default     = { size = "Standard_D4s_v5", min = 2, max = 8 }
}

variable "gpu_nodes" {
  description = "Nodes with a GPU for training: size and at most how many; they come when a pod asks for one. 0: none."
  type        = object({ size = string, max = number })
  default     = { size = "Standard_NC4as_T4_v3", max = 0 }
}

variable "database" {
  description = "PostgreSQL: SKU, megabytes, and whether it has a standby in another zone."
  type        = object({ sku = string, megabytes = number, standby = bool })
  default     = { sku = "GP_Standard_D2ds_v5", megabytes = 131072, standby = true }
}

variable "database_superuser" {
  description = "Password of PostgreSQL's superuser; it stands in no state and no plan."
  type        = string
  ephemeral   = true
  sensitive   = true
}

variable "superuser_version" {
  description = "Raise it to set a new password of the superuser."
  type        = number
  default     = 1
}

variable "protected" {
  description = "Whether the store refuses to be destroyed."
  type        = bool
  default     = true
}

variable "backup_days" {
  description = "How many days a nightly backup is kept; erasures do not reach it."
  type        = number
  default     = 35
}
