variable "subscription" {
  description = "Id of the Azure subscription."
  type        = string
}

variable "unique" {
  description = "Letters and digits that make the names of storage account and registry unique in all of Azure."
  type        = string
}

variable "location" {
  description = "Region of everything."
  type        = string
  default     = "germanywestcentral"
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

variable "gpu_nodes" {
  description = "Nodes with a GPU for training: size and at most how many."
  type        = object({ size = string, max = number })
  default     = { size = "Standard_NC4as_T4_v3", max = 0 }
}

variable "database_superuser" {
  description = "Password of PostgreSQL's superuser. Given at each apply (TF_VAR_database_superuser), kept nowhere."
  type        = string
  ephemeral   = true
  sensitive   = true
}

variable "superuser_version" {
  description = "Raise it to set a new password of the superuser."
  type        = number
  default     = 1
}
